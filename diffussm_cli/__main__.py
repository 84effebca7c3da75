"""`python -m diffussm_cli`, which is also what torchrun starts."""

from diffussm_cli.cli import app

if __name__ == "__main__":
    app()
