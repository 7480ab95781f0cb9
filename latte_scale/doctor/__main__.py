"""`python -m latte_scale.doctor`, as a rank that torchrun or srun starts."""

from latte_scale.doctor.command import command

command()
