"""Write train.jsonl and test.jsonl: short C functions, each with a one-line reason and a verdict with its CWE.

    python generate.py [FOLDER]

Every row is drawn from an idiom of `idioms.txt` – vulnerable ones, their safe twins, and decoys that look
like the other kind – and given names, types, sizes, a source of the untrusted value and unrelated statements
around it. The answer quotes the line that decides, says why, and ends with the verdict: a small model that has to
quote first looks before it judges. The same seed gives the same bytes on every machine and Python version.

No two rows, within or across the files, have the same *shape*: the token stream in which names are numbered
by first appearance and every number and string is one token. A held-out function is therefore never a
training function with other names, sizes or messages.
"""

from __future__ import annotations

import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

SEED = 120
TRAIN_ROWS, TEST_ROWS = 720, 120
SAFE_SHARE = 0.4
QUESTION = "Is this C function safe?"

KEYWORDS = frozenset(
    (
        "auto break case char const continue default do double else enum extern float for goto if inline int long "
        "register return short signed sizeof static struct switch typedef union unsigned void volatile while"
    ).split()
)
TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|[A-Za-z_]\w*|\d\w*|->|\+\+|--|<<|>>|&&|\|\||[-+*/%&|<>=!]=|\S')

DECLARATION = re.compile(r"(const |unsigned |struct |static )*\w+ \**\w+(\[\w*\])*( = [^;]*)?;")
MARK = "» "  # before the line that decides

# Names by the role they play; a function never uses one name for two roles.
NAMES = {
    "fn": (
        "load parse handle copy read open store update process fetch render export import build save apply show decode "
        "print resolve send prepare"
    ).split(),
    "noun": (
        "user name path title entry record packet header image frame config token label report page field session event "
        "message row key device profile node item archive note job"
    ).split(),
    "buf": "buf line out tmp text dest copy msg scratch local banner field block".split(),
    "src": "input name src data arg value text user host query title payload word topic".split(),
    "ptr": "p node item obj rec entry ctx conn elem cell ent blk".split(),
    "len": "len n size count total nbytes length amount".split(),
    "idx": "i idx pos k slot index off which".split(),
    "fp": "fp f file in stream fh".split(),
    "path": "path full target filename location dst".split(),
    "cmd": "cmd command shell cmdline run".split(),
    "tab": "table values names slots levels map weights codes prices".split(),
    "member": "name title host path label value user text".split(),
    "struct": "user request packet node session record device item header image".split(),
    "use": "emit submit consume forward enqueue draw inspect report".split(),
    "noisefn": "trace_enter count_call stats_hit touch_clock check_clock poll_events audit_begin tick".split(),
    "global": "calls last_error verbose busy hits ready dirty enabled".split(),
}
SIZES = (8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 100, 128, 200, 256, 512)

# Ways in which an untrusted string reaches the function: its parameter and the expression that reads it.
SOURCES = (
    ("const char *{src}", "{src}"),
    ("char *{src}", "{src}"),
    ("const struct {struct} *{req}", "{req}->{member}"),
    ("struct {struct} *{req}", "{req}->{member}"),
    ("char **argv", "argv[1]"),
    ("char *const *{src}", "{src}[0]"),
)
NOISE = (
    "{global}++;",
    "{noisefn}();",
    "{noisefn}({number});",
    "if ({global} > {number}) {noisefn}();",
    "if (!{global}) {noisefn}();",
    "{global} = {number};",
    "int rc = {number}; (void)rc;",
    "errno = 0;",
    "{global} |= {number};",
    'puts("{noun}");',
    'if ({global}) puts("{noun}");',
    "{noisefn}(); {global}--;",
)
EXTRA_PARAMETERS = ("int flags", "void *opaque", "unsigned mode", "long deadline", "struct pool *pool")
KINDS = {"int": ("int", "return -1;", "return 0;"), "void": ("void", "return;", ""), "bool": ("bool", "return false;", "return true;")}


@dataclass(frozen=True)
class Idiom:
    """One way to write a function: `parameters` and `body` with {roles} and ⟨choice¦choice⟩ in them."""

    label: str  # "CWE-120", or "SAFE"
    about: str  # the weakness that it has, or that it looks like having
    parameters: str
    body: str
    reason: str


@dataclass(frozen=True)
class Row:
    code: str
    answer: str
    about: str


def read_idioms(path: Path) -> list[Idiom]:
    """The blocks of `path`: a header `= LABEL ABOUT`, `( parameters )`, the body, and `> reason`."""
    idioms = []
    for block in re.split(r"(?m)^= ", path.read_text(encoding="utf-8"))[1:]:
        header, parameters, *body, reason = block.strip("\n").split("\n")
        label, about = header.split()
        idioms.append(Idiom(label, about, parameters.strip("() "), "\n".join(body), reason.removeprefix("> ")))
    return idioms


def shape(code: str) -> str:
    """The token stream of `code` without its names, numbers and strings."""
    numbers: dict[str, str] = {}
    stream = []
    for token in TOKEN.findall(code):
        if token[0] in "\"'":
            stream.append("S")
        elif token[0].isdigit():
            stream.append("0")
        elif (token[0].isalpha() or token[0] == "_") and token not in KEYWORDS:
            stream.append(numbers.setdefault(token, f"v{len(numbers)}"))
        else:
            stream.append(token)
    return " ".join(stream)


def draw(idiom: Idiom, rng: random.Random) -> Row:
    """One function of this idiom."""
    chosen: dict[str, str] = {}

    def pick(role: str) -> str:
        if role in ("use", "noisefn", "global", "number"):  # may be another one at each place
            return str(rng.randrange(1, 90)) if role == "number" else rng.choice(NAMES[role])
        if role not in chosen:
            taken = set(chosen.values())
            pool = SIZES if role in ("N", "M") else NAMES["ptr" if role in ("req", "ptr2") else "buf" if role == "buf2" else role]
            chosen[role] = rng.choice([str(name) for name in pool if str(name) not in taken])
        return chosen[role]

    def fill(text: str) -> str:
        while "⟨" in text:  # innermost choices first
            text = re.sub(r"⟨([^⟨⟩]*)⟩", lambda m: rng.choice(m[1].split("¦")), text, count=1)
        return re.sub(r"\{(\w+)\}", lambda m: pick(m[1]), text)

    kind, fail, done = KINDS[rng.choice(list(KINDS))]
    parameter, expression = rng.choice(SOURCES)
    body, parameters = idiom.body, idiom.parameters
    if "{M}" in body:  # two sizes of which M is the larger
        small, large = sorted(rng.sample(SIZES, 2))
        chosen["N"], chosen["M"] = str(small), str(large)
    body, parameters, reason = (
        text.replace("{SRC}", expression).replace("{PARAM}", parameter).replace("{FAIL}", fail) for text in (body, parameters, idiom.reason)
    )
    parameters, body, reason = fill(parameters), fill(body), fill(reason)
    lines = [line for line in body.split("\n") if line.strip()]
    declared = next((n for n, line in enumerate(lines) if not DECLARATION.fullmatch(line.removeprefix(MARK).strip())), 0)
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        lines.insert(rng.choice((declared, 0)), fill(rng.choice(NOISE)))
    returns = next((line.removeprefix("@") for line in lines if line.startswith("@")), None)
    lines = [line for line in lines if not line.startswith("@")]
    if returns is None:
        returns = kind + " "
        lines += [done] if done else []
    elif "{FAIL}" in idiom.body:
        lines = [line.replace(fail, "return NULL;" if "*" in returns else "return -1;") for line in lines]
    if rng.random() < 0.3:
        extra = rng.choice(EXTRA_PARAMETERS)
        parameters = rng.choice((f"{parameters}, {extra}", f"{extra}, {parameters}"))
    deciding = next(line.removeprefix(MARK).removesuffix(" {").strip() for line in lines if line.startswith(MARK))
    depth, text = 1, []
    for line in (line.removeprefix(MARK) for line in lines):
        depth -= line.startswith("}")
        text.append("  " * max(depth, 1) + line.strip())
        depth += line.count("{") - line.count("}") + line.startswith("}")
    name = f"{rng.choice(NAMES['fn'])}_{rng.choice(NAMES['noun'])}"
    code = f"{rng.choice(('static ', ''))}{returns}{name}({parameters}) {{\n" + "\n".join(text) + "\n}"
    verdict = "SAFE" if idiom.label == "SAFE" else f"VULNERABLE — {idiom.label}"
    return Row(code, f"{deciding} – {reason}\n{verdict}", idiom.about)


def generate(folder: Path) -> dict[str, list[Row]]:
    """Training and held-out rows: labels in the same shares in both, no shape twice."""
    rng = random.Random(SEED)
    idioms = read_idioms(folder / "idioms.txt")
    classes = sorted({idiom.about for idiom in idioms})
    seen: set[str] = set()
    rows: dict[str, list[Row]] = {}
    for split, wanted in (("test", TEST_ROWS), ("train", TRAIN_ROWS)):
        rows[split] = []
        while len(rows[split]) < wanted:
            about = classes[len(rows[split]) % len(classes)]
            safe = rng.random() < SAFE_SHARE
            row = draw(rng.choice([i for i in idioms if i.about == about and (i.label == "SAFE") == safe]), rng)
            if shape(row.code) not in seen:
                seen.add(shape(row.code))
                rows[split].append(row)
        rng.shuffle(rows[split])
    return rows


def main() -> None:
    here = Path(__file__).parent
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else here
    for split, rows in generate(here).items():
        with open(target / f"{split}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                messages = [{"role": "user", "content": f"{QUESTION}\n\n{row.code}"}, {"role": "assistant", "content": row.answer}]
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
