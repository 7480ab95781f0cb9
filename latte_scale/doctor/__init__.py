"""`latte-scale doctor`: is everything sound before a launch? One line for each finding, with its remedy.

`command` runs the checks and prints their lines (`lines`). On each rank alone: `software` (device, driver, libraries,
memory), `variables` (environment, shadowed modules), `network` (launch, names), `stored` (data, encoders, number of
ranks) and `saving` (disks, checkpoints, the run folder). On all ranks: `together` (slow ranks, all-reduce, clocks,
shared folders).
"""
