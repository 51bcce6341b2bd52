"""Sections of `gpu_suite.py`.

report      the record of a section, written as it goes
sections    tune, breakdown, products, attention, operators
steps       steps, options, contenders: whole training steps
checks      races, pytest: what only a device shows
races       the process of `races`: attention in one launch, again and again, and under the race checker
contender   the process of one contender of the training step
race        several functions of the same result on the same inputs, timed in turn
"""
