__version__ = "0.1.0"


def __getattr__(name):
    "`benchmarks` is called `datasets` now; code of before goes on."
    if name == "benchmarks":
        from . import datasets

        return datasets
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
