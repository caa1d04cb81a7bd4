"""Run a kernel's PTX on the CPU: what the compiler made of it, thread by thread, where there is no GPU.

Triton's interpreter runs a kernel's source. It knows no threads, no layouts and no barriers, fuses no multiplication with an
addition, and its bfloat16 is wrong. Here the PTX of sm_80 and sm_90, including the instructions for matrices and for the copy
engine, becomes C on top of ``ptx.c``: a function for each basic block, and in it, for each instruction, a loop over the lanes
of a warp.

Errors are an address outside the launch's tensors, a misaligned access, a shuffle among diverged lanes, warps that touch the
same byte of shared memory between two barriers (in kernels without the copy engine's own barriers), and results that depend on
the order in which warps and programs take turns. Approximate instructions are exact here, but for rounding; PTX allows them an
error of about 2⁻²².
"""

import ctypes
import functools
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

BITS = {"pred": 8, "f16": 16, "bf16": 16, "f32": 32, "f64": 64} | {f"{k}{n}": n for k in "bus" for n in (8, 16, 32, 64)}
EXPRESSIONS = {
    **{"add": "a + b", "sub": "a - b", "div": "a / b", "neg": "-a", "and": "a & b", "or": "a | b", "xor": "a ^ b"},
    **{"abs": "fabs(a)", "ex2": "exp2f(a)", "rsqrt": "(float)(1 / sqrt((double)a))"},
}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
SPECIAL = {"%tid.x": "(32 * w->id + l)"} | {
    f"%{name}.{x}": f"w->{name}[{i}]" for name in ("ctaid", "nctaid") for i, x in enumerate("xyz")
}
STORED = (
    "async.bulk.commit_group",
    "async.bulk.wait_group.read",
    "async.bulk.wait_group",
)  # stored at once: nothing to wait for


class Parameter(NamedTuple):
    offset: int
    kind: str
    size: int


class Translation:
    """C for one kernel: ``code``, and ``parameters`` by name."""

    def __init__(self, ptx: str) -> None:
        ptx = re.sub(r"//.*", "", ptx)
        entry = re.search(r"\.entry\s+\w+\((?P<parameters>.*?)\)[^{]*\{(?P<body>.*)\}", ptx, re.S)
        assert entry is not None
        self.parameters: dict[str, Parameter] = {}
        self.parameter_bytes = 0
        for kind, name, array in re.findall(
            r"\.param\b.*?\.(\w+)(?: \.ptr.*?)? (\w+)(?:\[(\d+)\])?,?\n", entry["parameters"] + "\n"
        ):
            size = int(array or BITS[kind] // 8)
            self.parameter_bytes += -self.parameter_bytes % (64 if array else size)
            self.parameters[name] = Parameter(self.parameter_bytes, kind, size)
            self.parameter_bytes += size
        self.registers: list[str] = []  # their declarations in C
        self.scopes: list[dict[str, str]] = [{}]  # C names of the registers and labels of inline assembly
        self.labels: dict[str, int] = {}  # number of the block that a label begins
        self.blocks: list[list[str]] = [[]]
        for statement in self._statements(entry["body"]):
            self._translate(statement)
        self.code = self._code(checked="mbarrier" not in ptx)

    def _statements(self, body: str) -> Iterator[str]:
        at, token = 0, re.compile(r"\s*(?:(?P<brace>[{}])|(?P<label>[\w$]+):(?!:)|(?P<statement>[^;]+);)")
        while match := token.match(body, at):
            at = match.end()
            if match["brace"] == "{":
                labels = re.findall(r"(\w+):(?!:)", body[at : body.index("}", at)])
                self.scopes.append({label: f"{label}_{at}" for label in labels})
            elif match["brace"]:
                self.scopes.pop()
            elif match["label"]:
                self.labels[self._named(match["label"])] = len(self.blocks)
                self.blocks.append([])
            else:
                yield match["statement"].strip()
        assert not body[at:].strip(), body[at:]

    def _named(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), name)

    def _translate(self, statement: str) -> None:
        if statement.startswith(".reg"):
            _, kind, names = statement.split(maxsplit=2)
            return self._declare(f"uint{BITS[kind[1:]]}_t", names)
        if statement.startswith("."):  # for debuggers
            return None
        match = re.match(r"(?:@(!?)(\S+)\s+)?(\S+)\s*(.*)", statement, re.S)
        assert match is not None
        negation, guard, instruction, operands = match.groups()
        condition = f"{negation}{self._read(guard, 'pred')}" if guard else "1"
        operation, *modifiers = instruction.split(".")
        # Operands may hold lists: [address, {x, y}]
        arguments = [x.strip() for x in re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,\[{])+", operands)]
        if operation in ("bra", "ret"):
            to = f"TO({self._named(arguments[0])})" if operation == "bra" else "DONE"
            self.blocks[-1].append(f"LANES pc[l] = {condition} ? {to} : {len(self.blocks)};")
            self.blocks.append([])
        elif operation in EXPRESSIONS:
            code = self._of(EXPRESSIONS[operation], modifiers, arguments)
            self.blocks[-1].append(f"LANES if ({condition}) {{ {code} }}")
        elif of_lane := getattr(self, f"lane_{operation}", None):
            self.blocks[-1].append(f"LANES if ({condition}) {{ {of_lane(modifiers, arguments)} }}")
        elif of_warp := getattr(self, f"warp_{operation}", None):
            code = of_warp(modifiers, arguments)
            self.blocks[-1].append(f"{{ uint32_t m = 0; LANES if ({condition}) m |= 1u << l; if (m) {{ {code} }} }}")
        else:
            raise NotImplementedError(statement)
        return None

    def _declare(self, kind: str, names: str) -> None:
        for name in names.split(", "):
            if array := re.fullmatch(r"%(\w+)<(\d+)>", name):
                self.registers.append(f"{kind} {array[1]}[{array[2]}][32];")
            else:
                local = f"{name}_{len(self.registers)}"
                self.registers.append(f"{kind} {local}[32];")
                self.scopes[-1][name] = f"r->{local}[l]"

    def _register(self, x: str) -> str:
        match = re.fullmatch(r"%([a-z]+)(\d+)", x)
        return f"r->{match[1]}[{match[2]}][l]" if match else self._named(x)

    def _read(self, x: str, kind: str) -> str:
        """C for operand ``x``, of type ``kind``, of lane l."""
        if number := re.fullmatch(r"0[fd]([0-9A-F]+)", x):
            c = f"0x{number[1]}ull"
        elif re.fullmatch(r"-?\d+|0x[0-9a-f]+", x):
            c = f"{x}ull"
        elif x in self.parameters:
            c = f"{self.parameters[x].offset}ull"  # their base address is added where they are used
        else:
            c = "0" if x == "global_smem" else SPECIAL.get(x) or self._register(x)
        if kind in ("f32", "f64"):
            return f"{kind}({c})"
        return f"({c} != 0)" if kind == "pred" else f"(({_integer(kind)}){c})"

    def _write(self, x: str, kind: str, c: str) -> str:
        """A C statement that writes ``c`` to ``x``; ``kind`` says whether ``c`` is a float."""
        return "" if x == "_" else f"{self._register(x)} = {f'of_{kind}({c})' if kind in ('f32', 'f64') else c};"

    def _address(self, x: str) -> str:
        base, _, offset = x.strip("[] ").partition("+")
        base = base.strip()
        return f"({self._read(base, 'u64' if base in self.parameters or '%rd' in base else 'u32')} + {offset.strip() or 0})"

    # Per lane: data

    def lane_mov(self, modifiers: list[str], arguments: list[str]) -> str:
        to, x = arguments
        bits = BITS[modifiers[-1]]
        if to[0] == "{":
            parts = _parts(to)
            n = bits // len(parts)
            taken = [self._write(part, "", f"x >> {i * n}") for i, part in enumerate(parts)]
            return f"uint64_t x = {self._read(x, modifiers[-1])}; {' '.join(taken)}"
        if x[0] == "{":
            parts = _parts(x)
            n = bits // len(parts)
            placed = [f"(uint64_t){self._read(part, f'u{n}')} << {i * n}" for i, part in enumerate(parts)]
            return self._write(to, "", " | ".join(placed))
        return self._write(to, "", self._read(x, modifiers[-1]))

    def lane_cvta(self, modifiers: list[str], arguments: list[str]) -> str:
        to, x = arguments
        begin = "(uint64_t)w->params + " if modifiers[0] == "param" else ""
        return self._write(to, modifiers[-1], f"{begin}{self._read(x, modifiers[-1])}")

    def lane_ld(self, modifiers: list[str], arguments: list[str]) -> str:
        parts, space, kind = _parts(arguments[0]), modifiers[0].partition(":")[0], modifiers[-1]
        n = BITS[kind] // 8 * len(parts)
        load = f"const {_integer(kind)}* x = load_{space}(w, {self._address(arguments[1])}, {n});"
        return load + "".join(self._write(part, "", f"x[{i}]") for i, part in enumerate(parts))

    def lane_st(self, modifiers: list[str], arguments: list[str]) -> str:
        parts, space, kind = _parts(arguments[1]), modifiers[0].partition(":")[0], modifiers[-1]
        values = ", ".join(self._read(part, f"u{BITS[kind]}") for part in parts)
        store = f"store_{space}(w, {self._address(arguments[0])}, x, sizeof x);"
        return f"uint{BITS[kind]}_t x[] = {{{values}}}; {store}"

    def lane_createpolicy(self, modifiers: list[str], arguments: list[str]) -> str:
        return ""  # a hint to caches, which do not exist here

    def lane_selp(self, modifiers: list[str], arguments: list[str]) -> str:
        to, a, b, which = arguments
        kind = f"u{BITS[modifiers[-1]]}"
        return self._write(to, "", f"{self._read(which, 'pred')} ? {self._read(a, kind)} : {self._read(b, kind)}")

    def lane_cvt(self, modifiers: list[str], arguments: list[str]) -> str:
        to, of = (m for m in modifiers if m.removesuffix("x2") in BITS)
        if to.endswith("x2"):
            high, low = (f"of_{to[:-2]}({self._read(x, of)})" for x in arguments[1:])
            return self._write(arguments[0], "", f"(uint32_t){high} << 16 | {low}")
        x = f"{of}({self._read(arguments[1], 'u16')})" if of in ("f16", "bf16") else self._read(arguments[1], of)
        if to in ("f16", "bf16"):
            return self._write(arguments[0], "", f"of_{to}({x})")
        if to in ("f32", "f64"):
            return self._write(arguments[0], to, f"({'float' if to == 'f32' else 'double'}){x}")
        assert of[0] != "f", modifiers
        return self._write(arguments[0], "", f"({_integer(to)}){x}")

    # Per lane: arithmetic

    def _of(self, expression: str, modifiers: list[str], arguments: list[str]) -> str:
        """``expression`` of the operands a, b, c."""
        kind, flush = modifiers[-1], "ftz" in modifiers
        if kind.endswith("16x2"):
            halves = [re.sub(r"\b([abc])\b", rf"(uint16_t)(\1 >> {s})", expression) for s in (0, 16)]
            kind, expression = "u32", f"(uint16_t)({halves[0]}) | (uint32_t)({halves[1]}) << 16"
        for name, x in zip("abc", arguments[1:], strict=False):
            value = self._read(x, kind)
            expression = re.sub(rf"\b{name}\b", f"ftz({value})" if flush else value, expression)
        return self._write(arguments[0], kind, f"ftz({expression})" if flush else expression)

    def lane_mul(self, modifiers: list[str], arguments: list[str]) -> str:
        if modifiers[-1] in ("f32", "f64"):
            return self._of("a * b", modifiers, arguments)
        return self._write(arguments[0], "", self._product(modifiers, arguments))

    def lane_mad(self, modifiers: list[str], arguments: list[str]) -> str:
        n = BITS[modifiers[-1]] * (2 if "wide" in modifiers else 1)
        return self._write(
            arguments[0], "", f"{self._product(modifiers, arguments)} + {self._read(arguments[3], f'u{n}')}"
        )

    def _product(self, modifiers: list[str], arguments: list[str]) -> str:
        kind = modifiers[-1]
        a, b = (self._read(x, kind) for x in arguments[1:3])
        product = f"({'' if kind[0] == 's' else 'unsigned '}__int128){a} * {b}"
        return f"(uint64_t)(({product}) >> {BITS[kind] if 'hi' in modifiers else 0})"

    def lane_fma(self, modifiers: list[str], arguments: list[str]) -> str:
        return self._of(f"fma{'f' * (modifiers[-1] == 'f32')}(a, b, c)", modifiers, arguments)

    def lane_max(self, modifiers: list[str], arguments: list[str]) -> str:
        return self._extreme("max", ">", modifiers, arguments)

    def lane_min(self, modifiers: list[str], arguments: list[str]) -> str:
        return self._extreme("min", "<", modifiers, arguments)

    def _extreme(self, name: str, sign: str, modifiers: list[str], arguments: list[str]) -> str:
        if modifiers[-1][0] != "f":
            return self._of(f"a {sign} b ? a : b", modifiers, arguments)
        whole = "isnan(a) || isnan(b) ? NAN : " * ("NaN" in modifiers)
        return self._of(f"{whole}f{name}(a, b)", modifiers, arguments)

    def lane_rcp(self, modifiers: list[str], arguments: list[str]) -> str:
        # In float64 it is a first guess, of which only the upper half counts.
        exact = "f64(of_f64(1 / a) & ~0xffffffffull)" if "approx" in modifiers and "f64" in modifiers else "1 / a"
        return self._of(exact, [m for m in modifiers if m != "ftz" or "f64" not in modifiers], arguments)

    def lane_not(self, modifiers: list[str], arguments: list[str]) -> str:
        return self._of("!a" if modifiers[-1] == "pred" else "~a", modifiers, arguments)

    def lane_shl(self, modifiers: list[str], arguments: list[str]) -> str:
        n, by = BITS[modifiers[-1]], self._read(arguments[2], "u32")
        return self._write(arguments[0], "", f"{by} < {n} ? {self._read(arguments[1], f'u{n}')} << {by} : 0")

    def lane_shr(self, modifiers: list[str], arguments: list[str]) -> str:
        n, by, x = BITS[modifiers[-1]], self._read(arguments[2], "u32"), self._read(arguments[1], modifiers[-1])
        return self._write(arguments[0], "", f"{x} >> ({by} < {n - 1} ? {by} : {n - 1}) >> ({by} > {n - 1})")

    def lane_bfe(self, modifiers: list[str], arguments: list[str]) -> str:
        x, start, length = (self._read(a, "u32") for a in arguments[1:])
        kind = _integer(modifiers[-1])
        return self._write(arguments[0], "", f"({kind})({x} << (32 - {start} - {length})) >> (32 - {length})")

    def lane_setp(self, modifiers: list[str], arguments: list[str]) -> str:
        how, kind = modifiers[0], modifiers[-1]
        a, b = (self._read(x, kind) for x in arguments[1:3])
        unordered = f"(isnan({a}) || isnan({b}))"
        if how in ("nan", "num"):
            return self._write(arguments[0], "", unordered if how == "nan" else f"!{unordered}")
        compared = f"{a} {COMPARISONS[how[:2]]} {b}"
        if kind[0] == "f":
            compared = f"{unordered} || {compared}" if how[2:] == "u" else f"!{unordered} && {compared}"
        return self._write(arguments[0], "", compared)

    # Per warp; m is the mask of the lanes that take part

    def warp_bar(self, modifiers: list[str], arguments: list[str]) -> str:
        assert arguments == ["0"], arguments
        return "together(m); barrier(w);"

    def warp_shfl(self, modifiers: list[str], arguments: list[str]) -> str:
        to, x, lane, *others = arguments
        assert others == ["31", "-1"], arguments
        source = {"bfly": "l ^", "idx": ""}[modifiers[1]] + self._read(lane, "u32")
        taken = self._write(to, "", f"x[({source}) & 31]")
        return f"together(m); uint32_t x[32]; LANES x[l] = {self._read(x, 'u32')}; LANES {{ {taken} }}"

    def warp_redux(self, modifiers: list[str], arguments: list[str]) -> str:
        x = self._read(arguments[1], "s32")
        step = {"add": f"y += {x}", "max": f"y = {x} > y ? {x} : y", "min": f"y = {x} < y ? {x} : y"}[modifiers[1]]
        first = "0" if modifiers[1] == "add" else x
        reduced = f"int l = 0; int32_t y = {first}; LANES {step};"
        return f"together(m); {reduced} LANES {{ {self._write(arguments[0], '', 'y')} }}"

    def warp_elect(self, modifiers: list[str], arguments: list[str]) -> str:
        register, elected = arguments[0].split("|")
        return f"together(m); LANES {{ {self._write(register, '', '0')} {self._write(elected, '', 'l == 0')} }}"

    def _fragment(self, name: str, registers: list[str], kind: str) -> str:
        values = "".join(f"{name}[l][{i}] = {self._read(x, kind)};" for i, x in enumerate(registers))
        return f"{'float' if kind == 'f32' else 'uint32_t'} {name}[32][{len(registers)}]; LANES {{ {values} }}"

    def _result(self, registers: list[str], kind: str, place: str) -> str:
        return "LANES {" + "".join(self._write(x, kind, place.format(i)) for i, x in enumerate(registers)) + "}"

    def warp_mma(self, modifiers: list[str], arguments: list[str]) -> str:
        *_, shape, _, _, to, number, _, of = modifiers
        assert (shape, to, of) == ("m16n8k16", "f32", "f32"), modifiers
        d, a, b, c = map(_parts, arguments)
        operands = self._fragment("a", a, "u32") + self._fragment("b", b, "u32") + self._fragment("d", c, "f32")
        return f"together(m); {operands} mma_m16n8k16(a, b, d, {number}); {self._result(d, 'f32', 'd[l][{}]')}"

    def warp_ldmatrix(self, modifiers: list[str], arguments: list[str]) -> str:
        assert "trans" not in modifiers
        to = _parts(arguments[0])
        load = f"uint32_t at[32], x[4][32]; LANES at[l] = {self._address(arguments[1])}; ldmatrix(w, at, x, {len(to)});"
        return f"together(m); {load} {self._result(to, 'u32', 'x[{}][l]')}"

    def warp_stmatrix(self, modifiers: list[str], arguments: list[str]) -> str:
        assert "trans" not in modifiers
        values = [f"x[{i}][l] = {self._read(x, 'u32')};" for i, x in enumerate(_parts(arguments[1]))]
        gather = f"uint32_t at[32], x[4][32]; LANES {{ at[l] = {self._address(arguments[0])}; {''.join(values)} }}"
        return f"together(m); {gather} stmatrix(w, at, x, {len(values)});"

    def warp_wgmma(self, modifiers: list[str], arguments: list[str]) -> str:
        if modifiers[0] != "mma_async":
            return "together(m);"  # products do not wait
        d, (a, b, add, *others) = _parts(arguments[0]), arguments[1:]
        assert others == ["1", "1", "0", "0"], others  # neither negated nor transposed
        factors = f"{self._read(a, 'u64')}, {self._read(b, 'u64')}, {self._read(add, 'pred')}"
        product = f"wgmma_k16(w, (float*)d, {2 * len(d)}, {factors}, {modifiers[-1]});"
        operands = f"int l = 0; {self._fragment('d', d, 'f32')}"
        return f"together(m); {operands} {product} {self._result(d, 'f32', 'd[l][{}]')}"

    def warp_cp(self, modifiers: list[str], arguments: list[str]) -> str:
        name = ".".join(modifiers)
        if name.removesuffix(".L2::cache_hint").endswith("shared.global"):
            to, of = map(self._address, arguments[:2])
            given = self._read(arguments[3], "u32")
            return f"LANES if (m >> l & 1) copy_later(w, {to}, {of}, {arguments[2]}, {given});"
        if name == "async.commit_group":
            return "w->group++;"
        if name == "async.wait_group":
            return f"copy_now(w, {arguments[0]});"
        if name in STORED:
            return ""
        store = name.startswith("async.bulk.tensor.2d.global")
        tile, place = (arguments[1], arguments[0]) if store else (arguments[0], arguments[1])
        found = re.fullmatch(r"\[(\S+), \{(\S+), (\S+)\}\]", place)
        assert found is not None
        x, y = (self._read(c, "s32") for c in found.groups()[1:])
        tile = f"{x}, {y}, {self._address(tile)}"
        copy = f"struct Map* map = (struct Map*){self._read(found[1], 'u64')}; tma(map, {tile}, {int(store)});"
        if not store:
            arrived = "map->box_rows * map->box_columns * map->size"
            copy += f"mbarrier_count(mbarrier({self._address(arguments[2])}), -{arrived}, 0);"
        return f"LANES if (m >> l & 1) {{ {copy} }}"

    def warp_fence(self, modifiers: list[str], arguments: list[str]) -> str:
        return ""

    def warp_mbarrier(self, modifiers: list[str], arguments: list[str]) -> str:
        if modifiers[0] == "init":
            at, count = self._address(arguments[0]), arguments[1]
            return f"LANES if (m >> l & 1) *mbarrier({at}) = (struct Mbarrier){{{count}, {count}}};"
        if modifiers[0] == "inval":
            return ""
        if modifiers[0] == "arrive":
            at, count = self._address(arguments[1]), self._read(arguments[2], "u32")
            return f"LANES if (m >> l & 1) mbarrier_count(mbarrier({at}), {count}, 1);"
        assert modifiers[0] == "try_wait", modifiers
        at, parity = self._address(arguments[1]), self._read(arguments[2], "u32")
        over = self._write(arguments[0], "", "over")
        return f"int l = 0, over = mbarrier({at})->phase != {parity}; if (!over) wait(w); LANES {{ {over} }}"

    def _code(self, checked: bool) -> str:
        """The whole program: the blocks, with the runtime around them."""
        head = "static void block_{}(struct Warp* w, struct Registers* r, uint32_t mask, int* pc) {{\n{}\n}}"
        blocks = [head.format(i, "\n".join(block)) for i, block in enumerate(self.blocks)]
        runtime = (Path(__file__).parent / "ptx.c").read_text()
        for name, text in {
            "REGISTERS": "\n".join(self.registers),
            "BLOCKS": re.sub(r"\bTO\((.*?)\)", lambda label: str(self.labels[label[1]]), "\n".join(blocks)),
            "TABLE": ", ".join(f"block_{i}" for i in range(len(blocks))),
        }.items():
            runtime = runtime.replace(f"/*{name}*/", text)
        return f"#define CHECKED {int(checked)}\n{runtime}"


def _integer(kind: str) -> str:
    return f"{'int' if kind[0] == 's' else 'uint'}{BITS[kind]}_t"


def _parts(x: str) -> list[str]:
    return [part.strip() for part in x.strip("{} ").split(",")]


class Program(NamedTuple):
    parameters: dict[str, Parameter]
    parameter_bytes: int
    run: Callable[..., bytes]  # as ``run`` in ptx.c


@functools.cache
def compiled(ptx: str) -> Program:
    translation = Translation(ptx)
    folder = Path(tempfile.gettempdir()) / "fused_losses_ptx"
    folder.mkdir(exist_ok=True)
    library = folder / f"{hashlib.sha256(translation.code.encode()).hexdigest()[:32]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            source, made = Path(scratch) / "kernel.c", Path(scratch) / "kernel.so"
            source.write_text(translation.code)
            # Integers wrap; nothing is fused except where the PTX says so.
            flags = ["-Og", "-fwrapv", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-shared", "-fPIC"]
            subprocess.run(["cc", *flags, "-o", str(made), str(source), "-lm"], check=True)
            made.rename(library)
    run: Any = ctypes.CDLL(str(library)).run
    run.restype = ctypes.c_char_p
    return Program(translation.parameters, translation.parameter_bytes, run)
