"""Wanted clips to decoded arrays: in this process, in worker processes, or by DALI."""
