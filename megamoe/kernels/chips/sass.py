"""The loop of a compiled product on SM90: which instructions a warp issues for a step of K.

Few rows make a product as fast as memory, if the multiprocessors can issue what a weight needs in the time in which
memory delivers it. So the instructions of the loop, over the weights of a step, are what a decoder is judged by.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

_LABEL = re.compile(r"\s*(\.?L\w+):\s*$")
_INSTRUCTION = re.compile(r"\S*:\S*\t(.*);")
_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s+(?:\S+,\s*)?`?\(?(\.?L\w+)")
_MATRIX = "HGMMA"


def product_loop(sass: str) -> Mapping[str, int] | None:
    """The smallest loop with matrix instructions in it, its opcodes and how often each stands there; None without one.

    sass   as Triton disassembles it: labels in lines of their own, instructions behind their control codes
    """
    labels: dict[str, int] = {}
    code: list[str] = []
    loops: list[list[str]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := _INSTRUCTION.match(line):
            code.append(instruction[1])
            branch = _BRANCH.search(code[-1])
            if branch and branch[1] in labels:  # backwards: its label came before it
                loops.append([_opcode(each) for each in code[labels[branch[1]] :]])
    multiplying = sorted((loop for loop in loops if _MATRIX in loop), key=len)
    return Counter(multiplying[0]) if multiplying else None


def _opcode(instruction: str) -> str:
    """@!P0 IMAD.SHL.U32 R1, R2, 0x8, RZ  ->  IMAD"""
    words = instruction.split()
    return words[1 if words[0].startswith("@") else 0].partition(".")[0]
