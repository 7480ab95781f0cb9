"""`latte-scale doctor`: checks before a launch, with one line per finding and its remedy.

`command` runs the checks and prints their lines (`lines`). Checks of a single rank: `software` (device, driver,
libraries, memory), `variables` (environment, shadowed modules), `network` (launch, names), `stored` (data, encoders,
number of ranks) and `saving` (disks, checkpoints, the run folder). Checks of all ranks: `together` (slow ranks,
all-reduce, clocks, shared folders).
"""
