"""`twintune` as a process of its own, with the engine in NumPy; the environment says how slow steps and saves are.

Starts in half a second, and leaves the time to do something to a run in the middle of a step or a save.
"""

import os
import time

from fake_engine import FakeEngine

import common.files
import common.launch
from common.cli import main


class SlowEngine(FakeEngine):
    def train_step(self, batch, learning_rate):
        time.sleep(float(os.environ.get("TEST_STEP_SECONDS", "0")))
        return super().train_step(batch, learning_rate)


def slow_sync(path, sync=common.files.sync):
    time.sleep(float(os.environ.get("TEST_SYNC_SECONDS", "0")))
    sync(path)


if __name__ == "__main__":
    common.launch.open_engine = lambda name, config, directory, lora: SlowEngine(config, vocabulary=416)
    common.files.sync = slow_sync
    main()
