"""`cavmae-fast tune`: proves, times and chooses, on the machine where it runs, what each operator is computed with.

plan        what is tuned: models, batch, the calls of a training step, grouped into units
search      the candidates of a unit
proof       whether a candidate is right
clock       how long it takes, in turn with the others
worker      the process in which candidates run
processes   starting, watching and ending such processes
journal     what is known so far, one JSON line at a time, so that a run that was cut short goes on
step        the whole training step with what was chosen, against the reference and against PyTorch
tune        the command: all of it, and the file that it writes
"""
