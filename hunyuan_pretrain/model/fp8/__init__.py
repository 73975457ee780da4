"""Training in FP8: what it is, and the recipes computed value by value on any machine.

Nearly all of a model's arithmetic is y = x W^T: of each linear layer, of each expert. Backward there are two more such
products, each of two of the same three tensors:

    y  = x  W^T     summed over inputs
    dx = dY W       summed over outputs
    dW = dY^T x     summed over tokens

FP8 training multiplies these, and nothing else, in numbers of 8 bits, which take half the memory traffic of bf16 and,
on GPUs that know them, half the time. Sums stay in fp32, results in bf16, the optimizer's weights in fp32.

Eight bits hold little. E4M3 (4 bits of exponent, 3 of mantissa) goes from 2^-9 to 448 and rounds to within 1/16 of a
number; E5M2 from 2^-16 to 57344, to within 1/8. Gradients are smaller than that. So every tensor gets a scale: it is
multiplied by it, rounded, and the product is divided by both scales again, which costs nothing:

    scale  = 448 / x.abs().max()              the largest value becomes the largest number
    values = (x * scale).to(float8_e4m3fn)    8 bits each; values / scale is x, nearly
    y      = (values_x @ values_w.T) / (scale_x * scale_w)

One value far larger than the others sends the others to zero. What to do about that is what recipes differ in:

    how many values share a scale   a tensor, or a block of 128 or 32, so that an outlier spoils its block only
    which values they are           a block lies along the summed dimension: a scale that changed within a sum could
                                    not be taken out of it. x is summed over inputs in y and over tokens in dW, so it
                                    is quantised twice, by rows and by columns. A square block serves both
    where the maximum comes from    the tensor itself, which is read once more before; or those of earlier steps, which
                                    is free, and saturates where values grow (the delayed recipe)
    which form a scale has          any fp32 number; a power of two, which itself rounds nothing; 8 bits of exponent

`config/recipe.py` has that as one table. Here is what computes it:

    quantise.py     numbers to FP8 and back: the arithmetic, against which the kernels are tested
    emulated.py     a linear layer, and experts, that multiply such numbers
    session.py      a training step: the only time when they do
    parameters.py   weights that exist in FP8 only

`model/engine/` does the same on Transformer Engine's kernels; on those it is fast. Sources: the formats,
arXiv:2209.05433; blocks of 1 x 128 and 128 x 128, arXiv:2412.19437; blocks of 32 with E8M0 scales, the OCP Microscaling
Formats specification 1.0.
"""
