"""PTX text to a list of instructions, as NVIDIA's PTX ISA 8.x writes them and Triton emits them."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ..ir.errors import CorruptFile

_ENTRY = re.compile(r"\.visible\s+\.entry\s+([\w$]+)\s*\(")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)[^,)]*?([\w$]+)\s*(?:\[(\d+)\])?\s*(?=,|\)|$)", re.M
)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.+)", re.S)
_VARIABLE = re.compile(
    r"\.(shared|global|const|local)\b[^;{=]*?\.(\w+)\s+([\w$]+)\s*((?:\[\w*\])*)\s*(?:=\s*(.*))?$",
    re.S,
)
_LABEL = re.compile(r"([$\w]+)\s*:(?!:)")
_GUARD = re.compile(r"@(!?)(%?[\w$]+)\s+")
_LOCATION = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)[^/]*(?://\s*(\S+))?")
_ASIDE = re.compile(r"\s*\.(?:file|pragma|section|maxntid|reqntid|minnctapersm|maxnreg)\b")
_NAME = re.compile(r"%?[A-Za-z_$][\w$]*")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    opcode: with its modifiers; words: the opcode at its dots; operands: texts at top-level commas;
    guard: predicate register, or None; negated: executed where the guard is false; line: in the
    PTX, from 1; source: file:line:column of the .loc before it, or "".
    """

    opcode: str
    words: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    line: int
    source: str

    @property
    def text(self) -> str:
        guard = "" if self.guard is None else f"@{'!' * self.negated}{self.guard} "
        return f"{guard}{self.opcode} {', '.join(self.operands)}".strip()

    @property
    def place(self) -> str:
        """For messages: the text, with long lists of registers cut, and where it stands."""
        text = re.sub(r"\{([^,}]+),[^}]{40,},([^,}]+)\}", r"{\1, ...,\2}", self.text)
        return f"{text} (PTX line {self.line}{f', {self.source}' if self.source else ''})"

    @property
    def type(self) -> str:
        """The last word: the type of the operands in nearly all instructions."""
        return self.words[-1]


@dataclass(slots=True)
class Program:
    """The entry function of a PTX module.

    parameters: (type, name, elements) in order, 0 elements for a scalar; registers: type by name,
    "%r" standing for %r0, %r1, ...; labels: the instruction that each stands before; variables:
    (space, bytes, initial bytes) by name.
    """

    name: str
    parameters: tuple[tuple[str, str, int], ...]
    instructions: list[Instruction] = field(default_factory=list[Instruction])
    registers: dict[str, str] = field(default_factory=dict[str, str])
    labels: dict[str, int] = field(default_factory=dict[str, int])
    variables: dict[str, tuple[str, int, bytes]] = field(
        default_factory=dict[str, tuple[str, int, bytes]]
    )


@functools.lru_cache(maxsize=64)
def parse(ptx: str) -> Program:
    """The module's only entry function; CorruptFile where there is none."""
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise CorruptFile("the PTX has no entry function", expected=".visible .entry name(...)")
    closing = ptx.index(")", entry.end())
    parameters = _PARAMETER.findall(re.sub(r"//[^\n]*", "", ptx[entry.end() : closing]))
    program = Program(entry.group(1), tuple((k, name, int(n or 0)) for k, name, n in parameters))
    for declaration in re.sub(r"//[^\n]*", "", ptx[: entry.start()]).split(";"):
        _declare(program, declaration.strip(), "")
    opening = ptx.index("{", closing)
    _Body(program).read(ptx[opening + 1 :], ptx.count("\n", 0, opening + 1) + 1)
    return program


class _Body:
    """Reads a function's body; inline assembly in braces has labels and registers of its own."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.scopes: list[tuple[str, set[str], int]] = [("", set(), 0)]
        self.count = 0
        self.source = ""

    def read(self, body: str, line: int) -> None:
        statement, start, depth = "", line, 0
        for number, row in self._rows(body, line):
            for char in row:
                if not statement.strip():
                    statement, start = "", number
                if char == ";" and depth == 0:
                    self._statement(statement.strip(), start)
                    statement = ""
                elif char == "{" and not statement:
                    self.count += 1
                    begin = len(self.program.instructions)
                    self.scopes.append((f"${self.count}", set(), begin))
                elif char == "}" and depth == 0:
                    self._forward_branches(*self.scopes.pop())
                    if not self.scopes:
                        return
                    statement = ""
                else:
                    depth += (char == "{") - (char == "}")
                    statement += char
                    if char == ":":
                        statement = self._label(statement)

    def _rows(self, body: str, line: int) -> Iterator[tuple[int, str]]:
        for number, row in enumerate(body.split("\n"), line):
            location = _LOCATION.match(row)
            if location:
                file, at, column, known = location.groups()
                self.source = known or f"file {file}:{at}:{column}"
            elif not _ASIDE.match(row):
                yield number, row.split("//", 1)[0] + "\n"

    def _label(self, statement: str) -> str:
        """The statement without the label that it may have come to; pairs of colons are names."""
        label = re.fullmatch(r"\s*([$\w]+)\s*:", statement)
        if label is None or "\n" in statement.strip():
            return statement
        name = label.group(1)
        scope, own, _ = self.scopes[-1]
        if scope:
            own.add(name)
        self.program.labels[name + scope] = len(self.program.instructions)
        return ""

    def _statement(self, statement: str, line: int) -> None:
        scope, own, _ = self.scopes[-1]
        if statement.startswith("."):
            own.update(_declare(self.program, statement, scope))
            return
        guard = _GUARD.match(statement)
        rest = statement[guard.end() :] if guard else statement
        opcode, _, operands = re.sub(r"\s+", " ", rest).partition(" ")
        if not opcode:
            return
        self.program.instructions.append(
            Instruction(
                opcode,
                tuple(opcode.split(".")),
                tuple(self._scoped(operand) for operand in split(operands)),
                self._scoped(guard.group(2)) if guard else None,
                bool(guard and guard.group(1)),
                line,
                self.source,
            )
        )

    def _scoped(self, operand: str) -> str:
        def rename(match: re.Match[str]) -> str:
            for scope, own, _ in reversed(self.scopes):
                if match.group() in own:
                    return match.group() + scope
            return match.group()

        return _NAME.sub(rename, operand) if len(self.scopes) > 1 else operand

    def _forward_branches(self, scope: str, own: set[str], begin: int) -> None:
        """Labels used before they stood get their scope when it ends."""
        found = self.program.instructions
        for at in range(begin, len(found) if scope else begin):
            if found[at].words[0] == "bra" and found[at].operands[0] in own:
                found[at] = replace(found[at], operands=(found[at].operands[0] + scope,))


def _declare(program: Program, statement: str, scope: str) -> list[str]:
    """Enter registers or a variable; returns the names that a scope must keep to itself."""
    registers = _REGISTERS.match(statement)
    if registers:
        kind, names = registers.groups()
        own = list[str]()
        for name in names.split(","):
            stem, _, count = name.strip().rstrip(">").partition("<")
            # a family of a scope is listed, since the scope may have a register of its stem, too
            listed = [f"{stem}{i}" for i in range(int(count))] if scope and count else [stem]
            own += listed
            program.registers.update((name + scope, kind) for name in listed)
        return own if scope else []
    variable = _VARIABLE.search(statement)
    if variable:
        space, kind, name, sizes, values = variable.groups()
        width = int(re.sub(r"\D", "", kind) or 8) // 8
        count = 1
        for size in re.findall(r"\[(\w*)\]", sizes):
            count *= int(size or "0", 0)
        numbers = re.findall(r"-?\w+", values or "")
        data = b"".join(
            (int(number, 0) % (1 << 8 * width)).to_bytes(width, "little") for number in numbers
        )
        program.variables[name] = (space, width * count, data)
    return []


def split(text: str) -> list[str]:
    """Parts at the commas that no bracket encloses."""
    parts, depth, start = list[str](), 0, 0
    for at, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts
