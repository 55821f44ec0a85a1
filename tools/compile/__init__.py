"""What the compiler makes of the kernels, seen without a GPU: `python -m compile sm_90 rows`."""
