"""The page of all losses names every loss, and every call on it gives what the reference of its row gives."""

import ast
import importlib
import inspect
import math
import pathlib
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

import fused_losses
from fused_losses import LinearLogits, aggregation, policy, preference, strict

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
FAMILIES = ["sft", "kl", "preference", "policy", "reward", "distillation"]
OTHERS = [
    "cross_entropy",
    "linear_cross_entropy",
    "token_statistics",
    "token_loss",
    "sequences",
    "aggregation",
    "rollouts",
    "divergence",
    "modules",
]
MODULES = {name: importlib.import_module(f"fused_losses.{name}") for name in FAMILIES + OTHERS}
PUBLIC = {
    name: thing
    for module in MODULES.values()
    for name, thing in vars(module).items()
    if callable(thing) and not name.startswith("_") and getattr(thing, "__module__", "").startswith("fused_losses")
}

SPAN = re.compile(r"`([^`\n]+)`")
ROWS = [line.split("|") for line in PAGE.splitlines() if line.startswith("|")]
CALLS = [code for row in ROWS if len(row) == 7 for code in SPAN.findall(row[4])]
PROSE = "\n".join(line for line in PAGE.splitlines() if not line.startswith("|"))
CALLS += [code for code in SPAN.findall(PROSE) if code.partition("(")[0] in PUBLIC and code.endswith(")")]


def names_called(code):
    return {n.func.id for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}


def names_of(code):
    try:
        return {n.id for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Name)}
    except SyntaxError:
        return set()


REFERENCES = {code: SPAN.findall(row[5]) for row in ROWS if len(row) == 7 for code in SPAN.findall(row[4])}
OTHER_RESULTS = {"off_policy_mask", "sparse_distillation_loss", "token_loss"}  # whose reference gives results per token


def references(code):
    """The row's reference functions of the names called, or nothing where one of them, or an argument of it, is missing."""
    calls = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    found = {}
    for file in REFERENCES.get(code, []):
        module = importlib.import_module("fused_losses." + file.removesuffix(".py").replace("/", "."))
        found |= {call.func.id: getattr(module, call.func.id) for call in calls if hasattr(module, call.func.id)}
    if OTHER_RESULTS & found.keys():
        return {}
    try:
        for call in calls:
            inspect.signature(found[call.func.id]).bind(*call.args, **{k.arg: k.value for k in call.keywords})
    except (KeyError, TypeError):
        return {}
    return found


def arguments():
    """The arguments of the page's calls, by name."""
    B, S, V, H = 4, 6, 10, 8
    values = {name: -torch.rand(B) * 5 for name in ("w", "l", "ref_w", "ref_l", "kl", "ref_kl", "c", "r", "x", "d")}
    tokens = ("w_t", "l_t", "log_probs", "ref_log_probs", "old", "ref", "rollout", "sampling", "token_logps")
    values |= {name: -torch.rand(B, S) for name in (*tokens, "lssp_w", "lssp_l", "values", "old_values", "returns")}
    ids, rewards = torch.randint(1, V, (B, S)), torch.randn(B, S)
    ids[:, 0] = 1
    values |= {
        "logits": torch.randn(B, S, V),
        "labels": ids.masked_fill(ids > 1, 2),
        "student_logits": torch.randn(B, S, V),
        "teacher_logits": torch.randn(B, S, V),
        "teacher_ids": torch.arange(3).expand(B, S, 3),
        "teacher_log_probs": torch.rand(B, S, 3).log() - 2,
        "k": 3,
        "index": ids,
        "inputs": ids,
        "input_ids": ids,
        "position_ids": torch.arange(S).expand(B, S),
        "mask": torch.ones(B, S),
        "advantages": torch.randn(B),
        "entropy": torch.rand(B, S),
        "loss": torch.rand(B, S),
        "n_w": torch.full((B,), 3),
        "n_l": torch.full((B,), 4),
        "nll_loss": torch.tensor(1.0),
        "chosen_rewards": torch.randn(B),
        "rejected_rewards": torch.randn(B),
        "chosen": ids,
        "rejected": ids,
        "rewards": rewards,
        "fn": lambda s: -s.log_probs - 0.01 * s.entropy,
        "weights": torch.rand(B, S),
    }
    values |= {"n": 7, "margin": 0.5, "beta": 0.1, "threshold": 0.1, "max_length": 16, "pad_id": 0, "pad_value": 0}
    values |= {"prompt_length": 2, "id": 1, "good": 2, "bad": 1, "placeholder_token_id": 1, "reward_token_ids": [2, 1]}
    values |= {"num_generations": 2, "num_sequences": 4, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    return values | {"world_size": 1, "device": torch.device("cpu"), "in_features": H, "num_classes": V}


# Where one name on the page stands for tensors of several shapes.
OWN = {
    "cross_entropy": {"input": torch.randn(3, 5), "target": torch.tensor([1, 2, 4])},
    "linear_cross_entropy": {
        "input": torch.randn(3, 8),
        "linear_weight": torch.randn(5, 8),
        "target": torch.tensor([1, 2, 4]),
    },
    "group_advantages": {"rewards": torch.randn(4)},
    "optimal_values": {"rewards": torch.randn(4)},
    "bco_loss": {"u": torch.rand(4)},
    "sequence_log_probs": {"cu_seqlens": torch.tensor([0, 10, 24])},
}


@pytest.mark.parametrize("code", dict.fromkeys(CALLS))
def test_call_gives_what_its_reference_gives(code):
    torch.manual_seed(0)
    scope = PUBLIC | arguments()
    for name in names_called(code):
        scope |= OWN.get(name, {})

    def tensors(scope):
        torch.manual_seed(1)  # some losses draw
        result = eval(code, scope)
        found = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        assert found or isinstance(result, torch.nn.Module)
        return found

    ours = tensors(dict(scope))
    assert all(x.isfinite().all() for x in ours)
    if code.partition("(")[0].endswith("_loss"):
        assert ours[0].ndim == 0
    if theirs := references(code):
        expected = tensors(scope | theirs)
        torch.testing.assert_close(ours[0], expected[0].to(ours[0].dtype))


def test_most_calls_have_such_a_reference():
    assert sum(bool(references(code)) for code in dict.fromkeys(CALLS)) > 60


LAZY_OR_NOT = [
    (code, row[2].strip(), next(iter(SPAN.findall(row[3])), None))
    for row in ROWS
    if len(row) == 5 and row[2].strip() in ("lazy", "lazy, not compiled", "materialises", "raises")
    for code in SPAN.findall(row[1])
    if "z" in names_of(code)
]


@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
@pytest.mark.parametrize(("code", "kind", "instead"), LAZY_OR_NOT)
def test_lazy_or_not(code, kind, instead):
    torch.manual_seed(0)
    B, S, V, H = 2, 6, 10, 4
    heads = {name: LinearLogits(torch.randn(B, S, H), torch.randn(V, H)) for name in "zt"}
    scope = PUBLIC | {"torch": torch, "F": F, "V": V, "ids": torch.randint(V, (B, S)), "mask": torch.rand(B, S) > 0.5}
    scope |= {"math": math, "banned": torch.arange(V) > 5, "p": torch.randn(B, S, V).softmax(-1)}
    eager = {name: logits.materialize() for name, logits in heads.items()}

    def value(code, logits):
        found = eval(code, scope | logits)
        return found.materialize() if isinstance(found, LinearLogits) else found

    if kind == "raises":
        with pytest.raises((RuntimeError, AttributeError), match=r"materialize|out-of-place"):
            eval(code, scope | heads)
    elif kind == "materialises":
        with strict(), pytest.raises(RuntimeError, match="materialises"):
            eval(code, scope | heads)
    with strict():
        found = value(code if kind.startswith("lazy") else instead, heads)
    if kind != "raises":
        torch.testing.assert_close(found, value(code, eager), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
@pytest.mark.parametrize(("code", "kind"), [(code, kind) for code, kind, _ in LAZY_OR_NOT if kind.startswith("lazy")])
def test_lazy_or_not_compiled(code, kind):
    torch.manual_seed(0)
    B, S, V, H = 2, 6, 10, 4
    scope = {"torch": torch, "F": F, "math": math, "V": V}
    fn = eval(f"lambda z, t, ids, mask, p: {code}", scope)
    z, t = (LinearLogits(torch.randn(B, S, H), torch.randn(V, H)) for _ in range(2))
    given = torch.randint(V, (B, S)), torch.rand(B, S) > 0.5, torch.randn(B, S, V).softmax(-1)
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="eager")
    if kind == "lazy":
        with strict():
            compiled(z, t, *given)
    else:
        with strict(), pytest.raises(RuntimeError, match="materialises"):
            compiled(z, t, *given)


def test_lazy_or_not_has_every_row():
    kinds = [kind for _, kind, _ in LAZY_OR_NOT]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "lazy": 35,
        "lazy, not compiled": 17,
        "materialises": 5,
        "raises": 2,
    }
    assert all(instead for _, kind, instead in LAZY_OR_NOT if not kind.startswith("lazy"))


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@pytest.mark.parametrize("lazy_teacher", [True, False])
@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
def test_kl_div_is_lazy(reduction, lazy_teacher):
    z, t = (LinearLogits(torch.randn(2, 3, 4), torch.randn(10, 4)) for _ in range(2))
    code = next(code for code, *_ in LAZY_OR_NOT if "batchmean" in code).replace("batchmean", reduction)
    expected = eval(code, {"F": F, "z": z.materialize(), "t": t.materialize()})
    with strict():
        found = eval(code, {"F": F, "z": z, "t": t if lazy_teacher else t.materialize()})
    torch.testing.assert_close(found, expected)


BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("lazy", [True, False])
def test_blocks_of_code_give_what_eager_does(lazy):
    """In the order of the page, without the training step at its top, which the examples are."""
    hidden, weight = torch.randn(2, 6, 4), torch.randn(10, 4)
    z = hidden @ weight.T
    labels = torch.tensor([[4, 1, 2, -100, 3, 9], [-100, 5, 6, 0, 0, 8]])
    segments = torch.tensor([[1, 1, 1, 1, 2, 2], [1, 1, 2, 2, 2, 2]])
    scope = PUBLIC | {"torch": torch, "F": F, "labels": labels, "segments": segments}
    scope["logits"] = LinearLogits(hidden, weight) if lazy else z
    expected = F.pad(labels[:, 1:], (0, 1), value=-100)
    counted = expected != -100
    log_probs = z.log_softmax(-1).gather(-1, expected.clamp(min=0)[..., None]).squeeze(-1)[counted]
    p = log_probs.exp()
    with strict():
        for code in BLOCKS[1:]:
            exec(code, scope)
            if "same" in code:
                within = F.pad(segments[:, 1:] == segments[:, :-1], (0, 1)) & counted
                packed = F.cross_entropy(z[within], expected[within])
                torch.testing.assert_close(scope["loss"], packed)
    found = [scope[name] for name in ("perplexity", "accuracy", "entropy", "loss")]
    torch.testing.assert_close(
        found,
        [
            (-log_probs.mean()).exp(),
            (z.argmax(-1) == expected)[counted].float().mean(),
            -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)[counted].mean(),
            (-((1 - p) ** 2) * log_probs).mean(),
        ],
    )


# kl_estimate's reference has k1 to k3 by name; the metrics are means of their inputs, and teacher_topk returns topk's result.
NO_REFERENCE = {"k1", "k2", "k3", "preference_metrics", "reward_metrics", "teacher_topk"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_function_appears(family):
    """On the page, in the package, in the reference and in a test."""
    module = MODULES[family]
    functions = {n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
    if module is preference:
        functions -= set(preference.LOSS_TYPES)  # the next test has these, by the name of their loss type
    functions = {n for n in functions if not n.startswith("_")}
    assert functions <= set().union(*map(names_called, CALLS)), "docs/losses.md"
    assert functions <= set(fused_losses.__all__), "fused_losses/__init__.py"
    assert functions <= vars(importlib.import_module(f"fused_losses.reference.{family}")).keys() | NO_REFERENCE
    tested = (ROOT / "tests" / f"test_{family}.py").read_text(encoding="utf-8")
    assert functions <= set(re.findall(r"\w+", tested)), f"tests/test_{family}.py"


@pytest.mark.parametrize("name", [*preference.LOSS_TYPES, *policy.LOSS_TYPES])
def test_every_loss_type_appears(name):
    wanted = "ppo_loss(" if name == "ppo" else f'loss_type="{name}"'
    assert any(wanted in code for code in CALLS)


def test_every_module_appears():
    modules = {name for name, thing in PUBLIC.items() if inspect.isclass(thing) and issubclass(thing, torch.nn.Module)}
    assert modules <= set().union(*map(names_called, CALLS))


def test_every_aggregation_appears():
    table = re.findall(r"``((?:seq|token)_\w*(?:mean|sum|norm))``", aggregation.aggregate.__doc__)
    assert len(set(table)) == 5
    assert set(table) <= {code for row in ROWS if len(row) == 5 for code in SPAN.findall(row[1])}


def test_every_file_exists():
    files = {code for row in ROWS if len(row) == 7 for code in SPAN.findall(row[5])}
    assert len(files) > 5
    for file in files:
        assert (ROOT / file).is_file()
