"""Compiled layers and offloaded activations of the torch engine: only speed and memory change."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import DEVICE, make_batches, open_fresh
from tiny_models import write_llama
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.compilers import nop
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from common.batches import BatchPlan
from common.config import LoraConfig, TrainConfig
from common.engine import Engine, StepBatch
from common.errors import MachineError, UserError
from common.layout import make_micro_batch
from common.sampling import Sampling
from torch_backend.compiled import CompiledLayers
from torch_backend.offloading import HostMemory, Offloading, is_a_layers_own
from torch_backend.step import Moments, make_update

needs_card = pytest.mark.skipif(DEVICE == "cpu", reason="on a card alone: TWINTUNE_TEST_DEVICE=gpu")
SETTINGS = [{}, {"gradient_checkpointing": True}, {"packing": True}]


def curve(llama: Path, lora: LoraConfig | None = None, **settings: object) -> list[float]:
    engine, plan = open_fresh("torch", llama, lora, **settings), BatchPlan(make_batches(), 4, 1, 42, 2)
    results = [engine.fetch(engine.train_step(plan.step_batch(step), 5e-3)) for step in range(1, 8)]
    assert len(list(engine.generate([[5, 6, 7]], Sampling(4)))) == 4  # with the layers' own code
    return [result.loss_sum / result.num_loss_tokens for result in results]


def test_a_compiled_update_is_the_plain_one_and_skips_what_is_not_finite() -> None:
    results = []
    for compiled in (False, True):
        random = torch.Generator().manual_seed(0)
        trainable = (torch.rand(10_001, generator=random) < 0.9).float()
        update = make_update(TrainConfig(weight_decay=0.1), trainable, compiled)
        weights, moments = torch.randn(10_001, generator=random), Moments.zeros(10_001, torch.device("cpu"))
        for step in range(1, 5):
            gradient = torch.randn(10_001, generator=random) * (math.inf if step == 3 else 1)
            norm, finite = update(weights, moments, gradient, torch.tensor(1.0), torch.tensor(1e-3 * step))
            assert finite == (step != 3)
        results.append((weights, moments.first, moments.second, moments.count, norm))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)  # float32 rounding, torch's own bound
    assert moments.count == 3


@needs_card  # a C++ compiler takes a minute for what Triton does in seconds
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(use_dora=True, modules_to_save=["lm_head"])], ids=str)
def test_compiled_layers_train_as_plain_ones(settings: dict, lora: LoraConfig, llama: Path) -> None:
    expected = curve(llama, lora, torch_compile=False, **settings)
    assert curve(llama, lora, torch_compile=True, **settings) == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def compile_by(monkeypatch: pytest.MonkeyPatch):
    """Let torch.compile trace as it does, but leave to another backend than inductor what takes the time."""
    plain = torch.compile

    def use(backend: Any) -> None:
        torch._dynamo.reset()
        counters.clear()
        monkeypatch.setattr(torch, "compile", partial(plain, backend=backend))

    yield use
    torch._dynamo.reset()


def step_of(rows: int, examples: range) -> StepBatch:
    data = make_batches(40)
    micro = make_micro_batch(data, [[example] for example in examples][:rows])
    return StepBatch(1, 0.0, (micro,), int(micro.loss_mask.sum()), 1, ())


def graphs_after(engine: Engine, batches: list[StepBatch], training: bool) -> int:
    """Count the graphs that dynamo has made of the layers once some batches were computed."""
    for batch in batches:
        launched = engine.train_step(batch, 1e-3) if training else engine.eval_step(batch.micro_batches[0])
        engine.fetch(launched)
    code = type(engine._base.model.layers[0]).forward.__code__
    return len(torch._dynamo.eval_frame._debug_get_cache_entry_list(code))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_all_layers_share_one_graph_to_train_and_one_to_evaluate(
    dropout: float, checkpointing: bool, compile_by: Any, tmp_path: Path
) -> None:
    compile_by("eager")
    base, lora = write_llama(tmp_path, num_hidden_layers=5), LoraConfig(lora_dropout=dropout)
    engine = open_fresh("torch", base, lora, torch_compile=True, gradient_checkpointing=checkpointing)
    batches = 2 * [step_of(4, range(4))]
    assert graphs_after(engine, batches, training=True) == 1
    assert graphs_after(engine, batches, training=False) == 2


def test_no_shape_makes_layers_run_uncompiled(compile_by: Any, tmp_path: Path) -> None:
    compile_by("eager")
    engine = open_fresh("torch", write_llama(tmp_path, num_hidden_layers=3), torch_compile=True)
    steps = (step_of(rows, range(first, 40)) for rows in (4, 3, 2, 1) for first in range(0, 36, 3))
    batches = list({step.micro_batches[0].token_ids.shape: step for step in steps}.values())
    assert len(batches) > 8
    # The first shape, any length, any length and rows, one row; each to train and to evaluate.
    assert graphs_after(engine, batches, training=True) <= 4
    seen = graphs_after(engine, batches, training=False)
    assert seen <= 8
    assert graphs_after(engine, batches, training=True) == seen


def test_checkpointing_inside_the_graph_changes_no_number(compile_by: Any, tmp_path: Path) -> None:
    compile_by("aot_eager")
    base, results = write_llama(tmp_path, num_hidden_layers=1), []
    for compiled in (False, True):
        engine = open_fresh("torch", base, torch_compile=compiled, gradient_checkpointing=True)
        results.append([engine.fetch(engine.train_step(step_of(4, range(4)), 5e-2)) for _ in range(3)])
    assert results[0] == results[1]


def test_what_no_gradient_asks_for_is_not_computed_twice(compile_by: Any, tmp_path: Path) -> None:
    base = write_llama(tmp_path, num_hidden_layers=1)
    products: list[int] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        aten, sum_of_products = torch.ops.aten, torch.ops.twintune.sum_of_products.default
        kinds = (aten.mm.default, aten.addmm.default, sum_of_products)
        products.append(sum(node.target in kinds for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    def backward_products(dropout: float = 0.0, **settings: object) -> int:
        backends = {"fw_compiler": nop, "bw_compiler": count}
        compile_by(aot_autograd(**backends, partition_fn=min_cut_rematerialization_partition))
        engine = open_fresh("torch", base, LoraConfig(lora_dropout=dropout), torch_compile=True, **settings)
        engine.fetch(engine.train_step(step_of(4, range(4)), 1e-3))
        return products.pop()

    kept, recomputed = backward_products(), backward_products(gradient_checkpointing=True)
    # Of a layer's 7 modules, each with a product by A and a sum of two, all but the last sum.
    assert recomputed - kept == 2 * 7 - 1
    # With dropout nothing is recomputed within the graph: inductor would drop other elements.
    assert backward_products(dropout=0.5, gradient_checkpointing=True) == kept


@pytest.mark.parametrize("offloading", [False, True])
def test_attention_is_not_computed_twice_where_its_result_is_kept(
    offloading: bool, compile_by: Any, llama: Path
) -> None:
    operations: list[list[str]] = []

    def partition(joint: torch.fx.GraphModule, *arguments: Any, **keywords: Any) -> Any:
        if inductor_config.joint_custom_post_pass:  # inductor's own partition calls it
            inductor_config.joint_custom_post_pass(joint.graph)
        return min_cut_rematerialization_partition(joint, *arguments, **keywords)

    def note(graph: torch.fx.GraphModule, _: Any) -> Any:
        operations.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    def counted(part: str) -> int:
        return sum(part in operation and "backward" not in operation for operation in operations[-1])

    compile_by(aot_autograd(fw_compiler=nop, bw_compiler=note, partition_fn=partition))
    model = AutoModelForCausalLM.from_pretrained(llama).train()
    plain = model(input_ids=torch.arange(32)[None]).logits.square().mean()
    plain.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    CompiledLayers(model, checkpointing=True, offloading=offloading, dropout=False)
    model(input_ids=torch.arange(32)[None]).logits.square().mean().backward()
    assert [counted("_scaled_dot_product"), counted("aten.mm")] == [not offloading, 20]
    for gradient, parameter in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


COMPILE = """
import json, sys
from pathlib import Path
from engines import make_batches, open_fresh
from common.batches import BatchPlan

settings = {"torch_compile": True, "gradient_checkpointing": True, "quantization": {"load_in_4bit": True}}
engine = open_fresh("torch", Path(sys.argv[1]), **settings)
result = engine.fetch(engine.train_step(BatchPlan(make_batches(), 4, 1, 42, 2).step_batch(1), 1e-3))
from torch._dynamo.utils import counters  # no earlier than a run imports torch
print(json.dumps([result.loss_sum, counters["aot_autograd"], counters["inductor"]]))
"""


def test_a_second_start_compiles_nothing(cli_environment: dict[str, str], tmp_path: Path) -> None:
    base = write_llama(tmp_path / "model", num_hidden_layers=1, hidden_size=64, intermediate_size=128)
    environment = {name: value for name, value in cli_environment.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    paths = f"{cli_environment['PYTHONPATH']}:{Path(__file__).parent}"
    environment |= {
        "PYTHONPATH": paths,
        "TWINTUNE_CACHE": str(tmp_path / "cache"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }

    def start() -> list:
        command = [sys.executable, "-c", COMPILE, str(base)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    (loss, graphs, kernels), (again, found, found_kernels) = start(), start()
    assert graphs["autograd_cache_saved"] == graphs["total"] == 3  # the layer, the norm and the update
    assert kernels["fxgraph_cache_miss"] > 0
    assert found == {"total": 3, "ok": 3, "autograd_cache_hit": 3}
    assert "fxgraph_cache_miss" not in found_kernels
    assert again == loss
    assert any((tmp_path / "cache" / "inductor").iterdir())


def test_what_a_layer_keeps_is_told_from_angles_masks_weights_and_what_a_norm_keeps() -> None:
    def held_on_a_card(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Any:
        held = torch.empty(shape, device="meta", dtype=dtype)
        return SimpleNamespace(ndim=held.ndim, shape=held.shape, dtype=dtype, nbytes=held.nbytes, is_cuda=True)

    def is_kept(tensor: Any, width: int = 3072, heads: int = 24) -> bool:
        return is_a_layers_own(tensor, width, heads, torch.bfloat16)

    assert is_kept(held_on_a_card(4, 2048, 3072))
    assert is_kept(held_on_a_card(4, 24, 2048, 128))  # what attention gave, also heads of less than the width in all
    assert is_kept(held_on_a_card(8192, 24, 64))  # and of packed rows
    assert not is_kept(held_on_a_card(1, 8192, 128))  # angles, one megabyte and more
    assert not is_kept(held_on_a_card(1, 1, 2048, 2048))  # a mask
    assert not is_kept(held_on_a_card(8192, 3072))  # a weight
    assert not is_kept(held_on_a_card(1, 16, 3072))  # not worth a copy
    assert not is_kept(held_on_a_card(4, 2048, 3072, dtype=torch.float32))  # a norm's
    assert not is_kept(held_on_a_card(4, 24, 2048, dtype=torch.float32))  # log-sum-exps
    assert not is_kept(torch.empty(4, 2048, 256, dtype=torch.bfloat16), 256)  # on the host already


def test_the_hosts_memory_is_lent_again_in_each_pass_and_grows_where_it_must() -> None:
    host = HostMemory(pinned=False)
    inputs, attended = torch.randn(2, 5, 12), torch.randn(2, 5, 3, 4).transpose(1, 2)
    places = []
    for _ in range(2):
        host.begin()
        lent = [host.like(each).copy_(each) for each in (inputs, attended, inputs)]
        assert all(map(torch.equal, lent, (inputs, attended, inputs)))
        assert [each.stride() for each in lent] == [inputs.stride(), attended.stride(), inputs.stride()]
        places.append([each.data_ptr() for each in lent])
    assert places[0] == places[1]
    assert len(set(places[0])) == 3
    host.begin()
    shorter, longer = host.like(inputs[:1]), host.like(torch.randn(3, 5, 12, dtype=torch.float64))
    assert shorter.data_ptr() == places[0][0]
    assert longer.shape == (3, 5, 12)
    assert longer.data_ptr() % 8 == 0
    assert host.like(inputs).data_ptr() == places[0][2]


@pytest.mark.skipif(DEVICE != "cpu", reason="this machine has a card, for which memory can be pinned")
def test_a_host_that_pins_no_memory_says_what_to_do() -> None:
    with pytest.raises(MachineError, match="the host has pinned"):
        HostMemory(pinned=True).like(torch.ones(3))


@needs_card
def test_few_offloaded_inputs_are_on_the_card_at_once() -> None:
    inputs = torch.ones(1, 1024, 4096, device="cuda", requires_grad=True)
    offloading = Offloading(inputs.device, 4096, 32, inputs.dtype)
    torch.cuda.reset_peak_memory_stats()
    with offloading.forward_pass():
        hidden = inputs
        for _ in range(40):  # the host is done with all of them before the card is with some
            hidden = checkpoint(torch.sin, hidden, use_reentrant=False)
    hidden.sum().backward()
    # At most 6: two inputs, of this layer and the one before, its output, and gradients of the three of them.
    assert torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated() < 10 * inputs.nbytes


@needs_card
@pytest.mark.parametrize("compiled", [False, True])
def test_offloaded_activations_come_back_as_they_were(compiled: bool, tmp_path: Path) -> None:
    base = write_llama(tmp_path, hidden_size=4096, num_hidden_layers=4)  # a hidden state of over a megabyte
    settings = {"gradient_checkpointing": True, "torch_compile": compiled}
    expected = curve(base, **settings)
    # Compiled layers keep attention's result with it: not the same graph, so not the same bits.
    assert curve(base, activation_offloading=True, **settings) == pytest.approx(expected, rel=1e-6 if compiled else 0)


@pytest.mark.skipif(DEVICE != "cpu", reason="this machine has a card to offload from")
def test_offloading_without_a_card_is_refused(llama: Path) -> None:
    with pytest.raises(UserError, match="activation_offloading: true: moves activations from a card's memory"):
        open_fresh("torch", llama, gradient_checkpointing=True, activation_offloading=True)


@pytest.mark.parametrize("name", ["torch_compile", "activation_offloading"])
def test_mlx_refuses_what_only_torch_does(name: str, llama: Path) -> None:
    with pytest.raises(UserError, match=f"{name}: true: .*; delete it"):
        open_fresh("mlx", llama, gradient_checkpointing=True, **{name: True})
