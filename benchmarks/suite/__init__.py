"""Sections of `gpu_suite.py`.

report      the record of a section, written as it goes
parity      what is right on this device, operator by operator and dtype by dtype; marks it as proven
proof       the process that proves one operator in one dtype, or one model
sections    operators, attention, steps, breakdown, pytest
race        several functions of the same result on the same inputs, timed in turn
"""
