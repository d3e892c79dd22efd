"""`twintune` as a process of its own, with the engine in NumPy; the environment says how slow steps, saves, words are.

Starts in half a second, and leaves the time to do something to a run in the middle of a step or a save.
"""

import os
import time

from fake_engine import FakeEngine

import common.files
import common.inputs
import common.talk.speaker
from common.cli import main


class SlowEngine(FakeEngine):
    def train_step(self, batch, learning_rate):
        time.sleep(float(os.environ.get("TEST_STEP_SECONDS", "0")))
        return super().train_step(batch, learning_rate)

    def generate(self, prompts, sampling):
        for pair in super().generate(prompts, sampling):
            time.sleep(float(os.environ.get("TEST_TOKEN_SECONDS", "0")))
            yield pair


def slow_sync(path, sync=common.files.sync):
    time.sleep(float(os.environ.get("TEST_SYNC_SECONDS", "0")))
    sync(path)


def open_slow(name, config, directory, lora):
    return SlowEngine(config.model_copy(update={"lora": lora}) if lora else config, vocabulary=416)


if __name__ == "__main__":
    for module in (common.inputs, common.talk.speaker):
        module.open_engine = open_slow
    common.files.sync = slow_sync
    main()
