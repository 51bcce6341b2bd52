"""Measures every floor of `cavmae_fast`, and tunes it on a GPU. Nothing needs to be installed but torch.

Programs, run from a checkout:

    python benchmarks/throughput.py     a training step: the published model, its obvious improvements, ours
    python benchmarks/data.py           every stage of the data path, and the loaders
    python benchmarks/roofline.py       what every launch of a step must do, and how long that takes on a GPU: none needed
    python benchmarks/gpu_suite.py      everything there is to know about a GPU (its sections: suite/)
    python benchmarks/render.py         tables from the records
    pytest benchmarks/bench_operators.py --benchmark-only -p benchmark

What they share: `common` (devices, provenance, files), `timing` (clocks, ceilings of the machine). The calls of
operators that are timed and proven are those of `cavmae_fast.ops.catalogue`; the rule by which they are
right is that of `cavmae_fast.ops.parity`. Records and tables: results/<device>/.
"""
