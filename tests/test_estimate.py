"""What a run needs, said before it starts: held against measured peaks and against what real engines keep."""

import json
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from allocations import allocations_of
from engines import open_fresh
from tiny_models import write_llama
from tiny_run import Run, examples
from torch.autograd.graph import saved_tensors_hooks

from common.batches import BatchPlan
from common.config import LoraConfig, QuantizationConfig, TrainConfig, load_config
from common.data.tokens import build_dataset
from common.engine import DeviceMemory, MicroBatch, StepBatch, choose_engine, device_memory, is_out_of_memory
from common.errors import MachineError, UserError
from common.estimate import guard
from common.estimate.activations import CHUNK_BYTES, TORCH_HEAP_HOLES, Setting, Work, activations
from common.estimate.changes import changed
from common.estimate.guard import advise, refuse_hopeless, total_bytes
from common.estimate.memory import estimate_memory
from common.estimate.shape import read_shape, shape_of
from common.estimate.verb import write_fixed
from common.estimate.workload import Workload, planned_workload, read_workload
from common.view.metrics import read_metrics
from torch_backend.device import Hardware

H200 = DeviceMemory("cuda", "NVIDIA H200", 150 * 10**9, compiles=True)
CPU = DeviceMemory("cpu", "the CPU", 20 * 10**9)
GB = 10**9


def decoder(
    layers: int, hidden: int, inner: int, queries: int, keys: int, vocabulary: int, head: int = 128, tied: bool = True
):
    """Make the config and headers of a Llama."""
    config = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": queries // head,
        "num_key_value_heads": keys // head,
        "head_dim": head,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }
    shapes = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,)}
    shapes |= {} if tied else {"lm_head": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
        shapes |= {f"{at}.self_attn.q_proj": (queries, hidden), f"{at}.self_attn.o_proj": (hidden, queries)}
        shapes |= {f"{at}.self_attn.{name}_proj": (keys, hidden) for name in "kv"}
        shapes |= {f"{at}.mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj": (hidden, inner)}
    return config, {f"{name}.weight": {"dtype": "BF16", "shape": shape} for name, shape in shapes.items()}


LLAMA_3B = shape_of("3B", *decoder(28, 3072, 8192, 3072, 1024, 128256))
LLAMA_8B = shape_of("8B", *decoder(32, 4096, 14336, 4096, 1024, 128256, tied=False))
SMOLLM2 = shape_of("135M", *decoder(30, 576, 1536, 576, 192, 49152, head=64))
NF4, MLX4 = QuantizationConfig(load_in_4bit=True), QuantizationConfig(bits=4)
DOUBLE = QuantizationConfig(load_in_4bit=True, use_double_quant=True)
CHECKPOINTED = {"gradient_checkpointing": True}
OFFLOADED = {**CHECKPOINTED, "activation_offloading": True}
PACKED = Workload(longest=80, supervised_share=0.4)

# Measured on an H200, 2026-11-23 to 29: torch 2.11, MLX 0.32.4, LoRA r=16 on all linear layers of a 3B, 4 x 2048, and
# of an 8B, 2 x 4096 and the longest row in 24 GB.
OF_3B = [
    ("torch", {}, Workload(), 21.79),
    ("torch", {"quantization": DOUBLE}, Workload(), 17.54),
    ("torch", {"packing": True}, PACKED, 22.62),
    ("torch", {"quantization": DOUBLE, **CHECKPOINTED}, Workload(), 4.99),
    ("torch", {"quantization": DOUBLE, **OFFLOADED}, Workload(), 3.58),
    ("torch", {"quantization": DOUBLE, **OFFLOADED, "per_device_train_batch_size": 1}, Workload(), 3.19),
    ("mlx", {}, Workload(), 27.92),
    ("mlx", {"packing": True}, PACKED, 29.75),
    ("mlx", CHECKPOINTED, Workload(), 9.94),
    ("mlx", {"quantization": MLX4}, Workload(), 24.73),
    ("mlx", {"quantization": MLX4, **CHECKPOINTED}, Workload(), 6.15),
    ("mlx", {"quantization": MLX4, **CHECKPOINTED, "per_device_train_batch_size": 1}, Workload(), 4.11),
    ("mlx", {"quantization": NF4, **CHECKPOINTED}, Workload(), 6.31),
    ("mlx", {"quantization": NF4, **CHECKPOINTED, "per_device_train_batch_size": 1}, Workload(), 4.31),
]
LONGER = {"per_device_train_batch_size": 2, "max_seq_length": 4096}
LONGEST = {"per_device_train_batch_size": 1, "max_seq_length": 90_112, "lora": LoraConfig(r=32)}
OF_8B = [
    ("torch", LONGER, Workload(), 42.85),
    ("torch", {"quantization": DOUBLE, **CHECKPOINTED, **LONGER}, Workload(), 9.96),
    ("torch", {"quantization": DOUBLE, **OFFLOADED, **LONGER}, Workload(), 7.86),
    ("torch", {"quantization": DOUBLE, **OFFLOADED, **LONGEST}, Workload(), 22.24),
]
MEASURED = [(base, *row) for base, rows in ((LLAMA_3B, OF_3B), (LLAMA_8B, OF_8B)) for row in rows]


def settings(**changes) -> TrainConfig:
    return TrainConfig(**{"per_device_train_batch_size": 4, "max_seq_length": 2048, "lora": LoraConfig(r=16)} | changes)


@pytest.mark.parametrize(("base", "engine", "changes", "workload", "peak"), MEASURED)
def test_estimates_are_within_a_tenth_of_what_was_measured_on_a_card(base, engine, changes, workload, peak):
    config = settings(**changes)
    memory = estimate_memory(base, config, workload.work(config), engine, H200)
    print(f"{memory.total / 1e9:.2f} estimated, {peak} measured", memory.parts)
    assert memory.total == pytest.approx(peak * GB, rel=0.1)


def test_packed_rows_keep_no_scores_on_mlx_and_pass_some_of_a_band():
    found = activations(
        LLAMA_3B, PACKED.work(settings(packing=True)), Setting("mlx", "cuda", 2, True, True, False, False, False)
    )
    assert found.attention == 28 * 4 * 24 * 4 * 2048  # a float32 logarithm for each layer, head and query
    assert found.passing == 5.5 * 4 * 24 * 4 * 2048 * 256  # arrays of 256 float32 scores for each head and query


# The quickstart in `twintune train` on two CPU cores, peak of the process, 2026-11-29.
@pytest.mark.parametrize(("engine", "peak"), [("torch", 2.080), ("mlx", 1.669)])
def test_estimates_are_near_what_was_measured_on_a_cpu(engine, peak):
    config = TrainConfig(packing=True, prefix_sharing=True, max_seq_length=192, per_device_train_batch_size=2)
    work = Workload(longest=96, supervised_share=0.569, seen=1.41).work(config)
    memory = estimate_memory(SMOLLM2, config, work, engine, CPU)
    print(f"{memory.total / 1e9:.2f} estimated, {peak} measured", memory.parts)
    assert memory.total == pytest.approx(peak * GB, rel=0.15)  # a third is libraries; a heap of small arrays has holes


@pytest.mark.parametrize(
    ("engine", "changes"),
    [("mlx", {}), ("mlx", {"quantization": {"load_in_4bit": True}, **CHECKPOINTED}), ("torch", {})],
)
def test_a_run_peaks_where_the_estimate_says(cli, tmp_path, monkeypatch, engine, changes):
    """The peak is that of the whole process, as metrics.jsonl has it."""
    monkeypatch.chdir(tmp_path)
    text = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "it is " * 120}]}
    Path("train.jsonl").write_text(f"{json.dumps(text)}\n" * 16)
    settings = {"model_name_or_path": str(wide(tmp_path / "model", 4)), "data": {"train": "train.jsonl"}}
    settings |= {"engine": engine, "device": "cpu", "output_dir": "out", "max_steps": 2, "save_strategy": "no"}
    settings |= changes
    Path("c.json").write_text(json.dumps(settings))
    config = load_config(Path("c.json"))
    estimated = estimate_memory(read_shape("model"), config, read_workload(config).work(config), engine, CPU)
    done = cli("train", "--config", "c.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    peak = read_metrics(Path("out/metrics.jsonl"))[-1]["peak_memory_bytes"]
    print(f"{estimated.total / 1e6:.0f} estimated, {peak / 1e6:.0f} measured", estimated.parts)
    assert estimated.total == pytest.approx(peak, rel=0.25)  # libraries and allocators differ by run


def micro_batch(rows: int, length: int, example: int, shared: int = 0) -> MicroBatch:
    """Make rows of examples of so many positions of their own, which go on from `shared` ones."""
    ids = np.random.default_rng(0).integers(0, 400, (rows, length)).astype(np.int32)
    place = np.tile(np.arange(-shared, length - shared), (rows, 1)).astype(np.int32)
    own = place >= 0
    segments = np.where(own, place // example + 1 + (shared > 0), 1)
    return MicroBatch(ids, ids, segments, np.where(own, place % example, place) + shared, own)


def wide(directory: Path, layers: int) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64, "num_hidden_layers": layers}
    return write_llama(directory, **sizes)


@pytest.mark.parametrize(
    ("dtype", "packed", "shared"),
    [("float32", False, 0), ("bfloat16", False, 0), ("float32", True, 0), ("float32", True, 32)],
)
def test_torch_keeps_what_the_formula_says_by_autograds_own_list(tmp_path, dtype, packed, shared):
    model = wide(tmp_path, 3)
    engine = open_fresh("torch", model, LoraConfig(r=1), dtype=dtype, packing=packed)
    own = {parameter.untyped_storage().data_ptr() for parameter in engine._model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    engine._model.train()
    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = engine._loss_of(micro_batch(4, 64, (64 - shared) // 4 if packed else 64, shared))
    assert loss.requires_grad
    config = TrainConfig(lora=LoraConfig(r=1), packing=packed)
    shape = read_shape(str(model))
    how = Setting("torch", "cpu", 4 if dtype == "float32" else 2, False, config.packing, False, False, False)
    without_holes = replace(how, device_type="cuda") if not packed else how
    work = Work(4, 64, 256, 32, seen=4 * (32 + 8) / 64 if shared else 1)
    found = activations(shape, work, without_holes).kept / (TORCH_HEAP_HOLES if packed else 1)
    print(f"{sum(kept.values())} kept, {found} by the formula")
    assert sum(kept.values()) == pytest.approx(found, rel=0.1)  # small ones are not counted: angles, statistics, loss


@pytest.mark.parametrize("packed_weights", [False, True])
def test_a_compiled_checkpointed_step_of_torch_peaks_where_the_formula_says(tmp_path, packed_weights, monkeypatch):
    monkeypatch.setattr(Hardware, "borders", lambda *_: True)  # as on a card
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "head_dim": 64}
    model = write_llama(tmp_path, num_hidden_layers=4, **sizes)
    settings = {"dtype": "bfloat16", "torch_compile": True, "gradient_checkpointing": True}
    quantization = {"quantization": NF4} if packed_weights else {}
    engine = open_fresh("torch", model, LoraConfig(r=8), **settings, **quantization)
    batch = StepBatch(1, 1.0, (micro_batch(4, 512, 512),), 2048, 2048, (0,))
    engine.fetch(engine.train_step(batch, 0.0))
    peak = max(accumulate(allocations_of(lambda: engine.fetch(engine.train_step(batch, 0.0)))))
    how = Setting("torch", "cuda", 2, True, False, True, False, False)
    found = activations(read_shape(str(model)), Work(4, 512, 2048, 512), how)
    print(f"{peak / 1e6:.1f} MB at the peak, {(found.kept + found.passing) / 1e6:.1f} by the formula")
    assert found.kept + found.passing == pytest.approx(peak, rel=0.15)  # three arrays of the MLP more would be 0.37


def test_micro_batches_of_a_step_take_the_memory_of_one_on_mlx(tmp_path):
    import mlx.core as mx

    engine, batch = open_fresh("mlx", wide(tmp_path / "model", 4), LoraConfig(r=1)), micro_batch(4, 64, 64)
    peaks = []
    for count in (1, 1, 6):  # the first one warms up
        step = StepBatch(1, 1.0, count * (batch,), count * 256, count * 256, (0,))
        mx.reset_peak_memory()
        engine.fetch(engine.train_step(step, 0.0))
        peaks.append(mx.get_peak_memory() - mx.get_active_memory())
    print(f"{peaks[1] / 1e6:.1f} MB for one, {peaks[2] / 1e6:.1f} for six")
    assert peaks[2] < 1.7 * peaks[1]  # the end of one runs beside the beginning of the next


def test_mlx_keeps_what_the_formula_says_layer_by_layer(tmp_path):
    import mlx.core as mx

    peaks, batch = [], micro_batch(4, 64, 64)
    for layers in (3, 7):
        engine = open_fresh("mlx", wide(tmp_path / str(layers), layers), LoraConfig(r=1))
        step = StepBatch(1, 1.0, (batch,), 256, 256, (0,))
        engine.fetch(engine.train_step(step, 0.0))
        mx.reset_peak_memory()
        engine.fetch(engine.train_step(step, 0.0))
        peaks.append(mx.get_peak_memory() - mx.get_active_memory())
        engine.close()
    how = Setting("mlx", "cpu", 4, False, False, False, False, False)
    found = activations(replace(read_shape(str(tmp_path / "3")), layers=1), Work(4, 64, 256, 64), how)
    assert (peaks[1] - peaks[0]) / 4 == pytest.approx(found.kept + found.attention, rel=0.1)


@pytest.mark.parametrize(
    ("rows", "length", "example", "shared", "vocabulary", "changes"),
    [
        (1, 2048, 32, 0, 8192, {"packing": True}),
        (1, 1024, 32, 128, 400, {"packing": True}),
        (1, 1024, 1024, 0, 400, {}),
        (8, 128, 128, 0, 400, {"quantization": MLX4}),
    ],
    ids=["chunks of logits", "a shared beginning", "long rows", "4 bits"],
)
def test_mlx_peaks_as_estimated(tmp_path, monkeypatch, rows, length, example, shared, vocabulary, changes):
    """Chunks are of 32 rows, as those of a large model; all logits would take four times 64 MB."""
    import mlx.core as mx

    monkeypatch.setattr("mlx_backend.loss.CHUNK_BYTES", 2**20)
    monkeypatch.setitem(CHUNK_BYTES, "mlx", 2**20)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64, "vocab_size": vocabulary}
    model = write_llama(tmp_path, tied=True, **sizes)
    engine, batch = open_fresh("mlx", model, LoraConfig(r=4), **changes), micro_batch(rows, length, example, shared)
    count = int(batch.loss_mask.sum())
    for _ in range(2):
        mx.reset_peak_memory()
        engine.fetch(engine.train_step(StepBatch(1, 1.0, (batch,), count, count, (0,)), 1e-3))
    peak = mx.get_peak_memory()
    engine.close()
    config = TrainConfig(lora=LoraConfig(r=4), **changes)
    work = Work(rows, length, count, shared + example, seen=count * (shared + example) / example / (rows * length))
    found = estimate_memory(read_shape(str(model)), config, work, "mlx", CPU)
    held = found.total - found.parts["framework"]  # which is not MLX's own
    print(f"{held / 1e6:.1f} estimated, {peak / 1e6:.1f} measured", found.parts)
    assert held == pytest.approx(peak, rel=0.2)  # a queue that runs ahead is not always as full


def test_examples_that_share_a_beginning_are_fewer_positions_of_which_more_are_supervised():
    data = build_dataset([([*range(1, 61), 70 + i, 80], [False] * 61 + [True], "made") for i in range(40)])
    settings = {"packing": True, "max_seq_length": 160}
    apart, shared = (
        planned_workload(BatchPlan.of(data, TrainConfig(**settings, prefix_sharing=each))) for each in (False, True)
    )
    assert apart == Workload(61, 40 / (40 * 61), 1.0, 40 * 61, 40)
    assert shared == Workload(61, 40 / (60 + 40), 40 * 61 / (60 + 40), 60 + 40, 40)  # one row of 100 positions


def test_the_shape_is_that_of_the_loaded_model(tied_llama):
    shape, engine = read_shape(str(tied_llama)), open_fresh("torch", tied_llama, LoraConfig(r=3))
    weights = sum(p.numel() for p in engine._base.parameters() if not p.requires_grad)
    assert shape.quantisable + shape.other == weights
    config = TrainConfig(lora=LoraConfig(r=3))
    trained = sum(int(np.prod(each)) for each in engine.adapter_shapes().values())
    memory = estimate_memory(shape, config, Workload().work(config), "torch", CPU)
    assert (memory.parts["weights"], memory.parts["adapters"]) == (4 * weights, 8 * trained)


def test_a_model_of_experts_is_counted_but_not_held_to_be_certain():
    config, headers = decoder(2, 256, 512, 256, 256, 1000)
    assert shape_of("dense", config, headers).certain
    mixture = shape_of("moe", config | {"num_experts_per_tok": 2, "moe_intermediate_size": 64}, headers)
    assert not mixture.certain and mixture.intermediate == 128


def test_a_config_without_widths_is_refused():
    with pytest.raises(UserError, match="'hidden_size'"):
        shape_of("odd", {"num_hidden_layers": 2}, {})


# ---- what makes it fit


def applied(config: TrainConfig, changes) -> TrainConfig:
    for change in changes:
        config = changed(config, change.settings)
    return config


@pytest.mark.parametrize(
    ("engine", "budget"),
    [("torch", 4), ("torch", 6), ("torch", 9), ("torch", 20), ("mlx", 6), ("mlx", 9), ("mlx", 14)],
)
def test_changes_bring_a_run_within_its_budget_and_keep_the_batch(engine, budget):
    config, machine = settings(), replace(H200, free_bytes=budget * GB)
    changes = advise(LLAMA_3B, config, Workload(), engine, machine, machine.free_bytes)
    after = applied(config, changes)
    size = total_bytes(LLAMA_3B, Workload(), engine, machine, after)
    assert changes and changes[-1].total_bytes == size <= machine.free_bytes
    assert after.per_device_train_batch_size * after.gradient_accumulation_steps == 4
    assert after.lora.lora_alpha / after.lora.r == config.lora.lora_alpha / config.lora.r
    TrainConfig.from_dict(after.to_dict())  # no keys that contradict each other


def test_the_least_harmful_change_comes_first_and_alone_where_it_suffices():
    (change,) = advise(LLAMA_3B, settings(), Workload(), "torch", H200, 12 * GB)
    assert change.settings == {"gradient_checkpointing": True}
    (change,) = advise(LLAMA_3B, settings(packing=True), PACKED, "torch", H200, 16 * GB)
    assert change.settings == {"max_seq_length": 1024, "gradient_accumulation_steps": 2}


def test_what_fits_nowhere_is_told_with_all_that_helps():
    changes = advise(LLAMA_3B, settings(), Workload(), "torch", H200, GB)
    assert changes[-1].total_bytes > GB
    keys = {key for change in changes for key in change.settings}
    assert {"gradient_checkpointing", "activation_offloading", "quantization.load_in_4bit", "lora.r"} <= keys


# ---- the refusal before a run, and the error within


def test_a_run_that_cannot_fit_is_refused_with_what_makes_it_fit(llama, monkeypatch):
    config = TrainConfig(lora=LoraConfig(r=4), max_seq_length=256, per_device_train_batch_size=64)
    monkeypatch.setattr(guard, "device_memory", lambda *_: DeviceMemory("cuda", "a small card", 120_000_000))
    with pytest.raises(
        MachineError, match="per_device_train_batch_size: 32, gradient_accumulation_steps: 2  # then"
    ) as error:
        refuse_hopeless(config, "torch", str(llama), Workload())
    assert error.value.exit_code == 3 and "a small card" in str(error.value) and "--force" in str(error.value)
    size = total_bytes(read_shape(str(llama)), Workload(), "torch", guard.device_memory(), config)
    within = DeviceMemory("cuda", "a card", round(size / 1.2))
    monkeypatch.setattr(guard, "device_memory", lambda *_: within)
    refuse_hopeless(config, "torch", str(llama), Workload())  # within the margin: not sure enough


def test_modules_of_unknown_names_are_left_to_the_engine_to_judge(llama):
    config = TrainConfig(device="cpu", lora=LoraConfig(r=10**9, target_modules=("qkv_of_another_name",)))
    refuse_hopeless(config, choose_engine("auto"), str(llama), Workload())


def test_the_look_before_a_run_costs_no_tenth_of_a_second(llama):
    name = choose_engine("auto")
    device_memory(name, "cpu")  # the engine is imported in any case
    began = time.process_time()
    refuse_hopeless(TrainConfig(device="cpu"), name, str(llama), Workload())
    assert time.process_time() - began < 0.1


def test_memory_that_runs_out_names_step_shape_settings_and_the_good_checkpoint(tmp_path):
    run = Run(tmp_path, examples(11), save_steps=4)
    launch = run.engine.train_step

    def full(batch, rate):
        if batch.step == 5:
            raise MemoryError
        return launch(batch, rate)

    run.engine.train_step, run.engine.name = full, "torch"
    with pytest.raises(MachineError) as error:
        run.train()
    text = str(error.value)
    assert text.startswith("step 5: memory ran out with 2 x 16 tokens; ")
    assert "GB are free now" in text and "checkpoint-4 is good" in text
    assert [line.strip().partition(":")[0] for line in text.splitlines()[1:4]] == [
        "gradient_checkpointing",
        "per_device_train_batch_size",
        "quantization",
    ]


OUT_OF_MEMORY = """
    import resource, sys, psutil
    sys.path.insert(0, "tests")
    from pathlib import Path
    from engines import open_fresh
    from test_estimate import micro_batch
    from common.config import TrainConfig
    from common.engine import StepBatch
    from common.errors import MachineError
    from common.estimate.guard import explained

    engine = open_fresh("torch", Path(sys.argv[1]))
    def step(rows):
        return StepBatch(7, 1.0, (micro_batch(rows, 64, 64),), 64 * rows, 64 * rows, (0,))
    engine.fetch(engine.train_step(step(1), 1e-3))
    limit = psutil.Process().memory_info().vms + 50_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        with explained(TrainConfig(device="cpu"), "torch", step(512), lambda: "all is good"):
            engine.fetch(engine.train_step(step(512), 1e-3))
    except MachineError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print("then", engine.fetch(engine.train_step(step(1), 1e-3)).updated)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to RLIMIT_AS")
def test_torch_out_of_memory_for_real_is_explained_and_the_engine_lives(llama):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(OUT_OF_MEMORY), str(llama)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    assert "step 7: memory ran out with 512 x 64 tokens" in done.stdout, done.stderr
    assert "all is good" in done.stdout and done.stdout.endswith("then True\n")


@pytest.mark.parametrize(
    "text",
    [
        "[malloc] Unable to allocate 17179869184 bytes.",
        "[metal::malloc] Attempting to allocate 68719476736 bytes which is greater than the maximum allowed size",
        "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackError...)",
    ],
)
def test_mlx_out_of_memory_is_recognised_by_its_text(text):
    # For real it can't be had here: MLX's CPU build writes where its allocation failed, which ends the process.
    assert is_out_of_memory("mlx", RuntimeError(text))
    assert not is_out_of_memory("mlx", RuntimeError("[matmul] Last dimension of first input must match"))


# ---- the verb


@pytest.fixture
def config_file(llama, tmp_path) -> Path:
    line = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(line) + "\n")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"model_name_or_path": str(llama), "data": {"train": "train.jsonl"}}))
    return path


def test_json_is_one_object_of_the_designs_form(cli, config_file):
    done = cli("estimate", "--config", config_file, "--device", "cpu", "--json", cwd=config_file.parent)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    *parts, total = found["memory_bytes"].values()
    assert sum(parts) == total and found["fits"] is (total <= found["budget_bytes"]) is True
    assert found["seconds_per_epoch"] > 0 and found["changes"] == []


def test_what_cannot_fit_here_ends_with_3_for_estimate_and_train_alike(cli, config_file):
    size = ("--set", "lora.r=500000000", "--device", "cpu")  # 3 TB of adapter
    done = cli("estimate", "--config", config_file, *size, "--json", cwd=config_file.parent)
    assert done.returncode == 3 and json.loads(done.stdout)["fits"] is False
    assert json.loads(done.stdout)["changes"][-1]["set"]["lora.r"] < 500000000
    done = cli("train", "--config", config_file, *size, "--set", "save_strategy=no", cwd=config_file.parent)
    assert done.returncode == 3, done.stdout
    assert "this run needs about" in done.stderr and "lora.r: " in done.stderr and "Loading" not in done.stdout


def test_fix_writes_beside_the_config_and_never_over_anything(tmp_path):
    source = tmp_path / "mine.yaml"
    source.write_text("model_name_or_path: m  # a base\nlora: {r: 16}\n")
    machine = replace(H200, free_bytes=3 * GB)
    changes = advise(LLAMA_3B, settings(), Workload(), "torch", machine, machine.free_bytes)
    target = write_fixed(source, changes)
    assert target == tmp_path / "mine.fits.yaml" and "# a base" in source.read_text()
    assert "gradient_checkpointing: true" in target.read_text() and "load_in_4bit: true" in target.read_text()
    with pytest.raises(UserError, match="is there already"):
        write_fixed(source, changes)
