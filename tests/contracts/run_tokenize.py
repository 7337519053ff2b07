"""`tokenize` as a process of its own, with slow images: run_tokenize.py MODEL IMAGES OUT (SECONDS_PER_IMAGE in the environment)."""

import os
import sys
import time

from vlm_jax.data import code_views
from vlm_jax.generate.tokenize import tokenize

load = code_views.Views.load


def slow(self, source):
    time.sleep(float(os.environ.get("SECONDS_PER_IMAGE", "0")))
    return load(self, source)


code_views.Views.load = slow
tokenize(sys.argv[1], [sys.argv[2]], sys.argv[3], size=16, batch=4, shard_images=4, threads=1)
print("ended")
