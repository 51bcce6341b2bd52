"""Sections of `gpu_suite.py`.

report      the record of a section, written as it goes
sections    tune, steps, breakdown, products, attention, operators, contenders, pytest
contender   the process of one contender of the training step
race        several functions of the same result on the same inputs, timed in turn
"""
