"""`python -m latte_scale.doctor`, as a rank that torchrun or srun starts."""

from latte_scale.doctor import command

command()
