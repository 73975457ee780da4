"""Training in FP8: what it is, and the recipes computed value by value on any machine.

Nearly all of a model's arithmetic is y = x W^T, in the linear layers and the experts. The backward pass adds two more
such matmuls, each of two of the three tensors x, W and dY:

    y  = x  W^T     summed over inputs
    dx = dY W       summed over outputs
    dW = dY^T x     summed over tokens

FP8 training runs these matmuls, and nothing else, on 8-bit numbers. They take half the memory traffic of bf16 and, on
GPUs that support them, half the time. Sums stay in fp32, results in bf16, the optimizer's weights in fp32.

Eight bits hold little. E4M3 (4 bits of exponent, 3 of mantissa) ranges from 2^-9 to 448 and rounds to within 1/16 of a
number; E5M2 from 2^-16 to 57344, to within 1/8. Gradients are smaller than that. So every tensor is multiplied by a
scale and rounded, and the result of the matmul is divided by both scales, which costs nothing:

    scale  = 448 / x.abs().max()              the largest value becomes the largest FP8 number
    values = (x * scale).to(float8_e4m3fn)    8 bits each; values / scale is x, up to rounding
    y      = (values_x @ values_w.T) / (scale_x * scale_w)

One value far larger than the others rounds the others to zero. Recipes differ in what they do about that:

    how many values share a scale   a tensor, or a block of 128 or 32, so that an outlier spoils its block only
    which values they are           a block lies along the summed dimension: a scale that changed within a sum could
                                    not be factored out of it. x is summed over inputs in y and over tokens in dW, so it
                                    is quantised twice, by rows and by columns. A square block serves both
    where the maximum comes from    the tensor itself, which costs reading it once more; or earlier steps, which costs
                                    nothing but saturates when values grow (the delayed recipe)
    which form a scale has          any fp32 number; a power of two, which adds no rounding; 8 bits of exponent

`config/recipe.py` has that as one table. This package computes it:

    quantise.py     numbers to FP8 and back: the arithmetic that the kernels are tested against
    emulated.py     a linear layer, and experts, that multiply such numbers
    session.py      a training step: the only time when they do
    parameters.py   weights that exist in FP8 only

`model/engine/` does the same, fast, on Transformer Engine's kernels. Sources: the formats, arXiv:2209.05433; blocks of
1 x 128 and 128 x 128, arXiv:2412.19437; blocks of 32 with E8M0 scales, the OCP Microscaling Formats specification 1.0.
"""
