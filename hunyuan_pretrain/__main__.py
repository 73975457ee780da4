"""`python -m hunyuan_pretrain` runs the command hunyuan-pretrain."""

from hunyuan_pretrain.cli import main

if __name__ == "__main__":
    main()
