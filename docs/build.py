"""Makes README.md and the documentation site from the notebooks.

python docs/build.py readme            README.md from nbs/index.ipynb
python docs/build.py site [--strict]   docs/_build/html; --strict turns warnings and broken links into errors
"""

import argparse
import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
from fastcore.docments import MarkdownRenderer, docments
from nbconvert import MarkdownExporter
from nbdev.doclinks import NbdevLookup

ROOT = Path(__file__).resolve().parents[1]
NBS, BUILD = ROOT / "nbs", ROOT / "docs" / "_build"
DIRECTIVE = re.compile(r"^#\|\s*(\w+)(?:[ :]+(.*))?$")


def directives(source):
    "The `#|` lines of a cell as a dict, and the rest of its source."
    found, rest = {}, []
    for line in source.splitlines():
        match = DIRECTIVE.match(line)
        if match:
            found[match[1]] = (match[2] or "").strip()
        else:
            rest.append(line)
    return found, "\n".join(rest).strip()


def hidden(found, cell):
    "Whether a reader should not see this code cell's source."
    return (
        found.get("echo") == "false" or "hide_input" in found or "injected-parameters" in cell.metadata.get("tags", [])
    )


def documented(cell_source, module):
    "Markdown for the public functions, classes and patched-in methods that an exported cell defines."
    parts = []
    for node in ast.parse(cell_source).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        owner = (
            node.args.args[0].annotation.id
            if any(getattr(getattr(d, "func", d), "id", "") == "patch" for d in node.decorator_list)
            else None
        )
        if owner and not ast.get_docstring(node):
            continue
        symbol = getattr(getattr(module, owner) if owner else module, node.name)
        name = f"{owner}.{node.name}" if owner else node.name
        parts.append(symbol_page(symbol, name, 3) + source_of(cell_source, node))
        if isinstance(node, ast.ClassDef):
            methods = [n.name for n in node.body if isinstance(n, ast.FunctionDef) and ast.get_docstring(n)]
            parts += [symbol_page(getattr(symbol, m), f"{name}.{m}", 4) for m in methods if not m.startswith("_")]
    return "\n\n".join(parts)


def source_of(cell_source, node):
    "The source of a function or class, folded away."
    return f"\n\n:::{{dropdown}} Source\n```python\n{ast.get_source_segment(cell_source, node)}\n```\n:::"


def symbol_page(symbol, name, level):
    "Heading, signature, docstring and parameter table of one function or class."
    if isinstance(symbol, property) or (inspect.isclass(symbol) and "__init__" not in vars(symbol)):
        return f"{'#' * level} {name}\n\n*{inspect.getdoc(symbol)}*"
    signature = re.sub(r"  *# .*$", "", MarkdownRenderer(symbol, name=name)._repr_markdown_(), flags=re.M)
    return f"{'#' * level} {name}\n\n{signature}\n\n{parameter_table(symbol)}"


def parameter_table(symbol):
    "The documented parameters and the result of a function as a Markdown table, or '' where nothing is said of them."
    rows = []
    for name, doc in docments(symbol, full=True).items():
        if not doc["docment"] or name == "self":
            continue
        anno, default = (doc.get(k, inspect.Parameter.empty) for k in ("anno", "default"))
        kind = "" if anno is inspect.Parameter.empty else f"`{getattr(anno, '__name__', anno)}`"
        usual = "" if default is inspect.Parameter.empty else f"`{default!r}`"
        title = "**returns**" if name == "return" else f"`{name}`"
        rows.append([title, kind, usual, doc["docment"]])
    if not rows:
        return ""
    columns = zip(["parameter", "type", "default", "meaning"], *rows, strict=True)
    head, *rows = zip(*(c for c in columns if any(c[1:])), strict=True)  # without empty columns
    lines = [head, ["--"] * len(head), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in lines)


def page_name(path):
    "nbs/01_losses.ipynb -> losses.ipynb: the reader's address has no number."
    return re.sub(r"^\d+[a-z]?_", "", Path(path).name)


def relink(text, depth):
    "Links as they work on the site: pages without numbers, figures beside the pages, symbols relative."
    text = re.sub(r"\]\(((?:\.\./)*(?:[\w-]+/)*)\d+[a-z]?_(\w+)\.ipynb", r"](\1\2.ipynb", text)
    text = re.sub(r"(\]\(|src=\")\.\./((?:\.\./)*figures/)", r"\1\2", text)
    text = re.sub(r"\]\(/(\w[\w/]*)\.html(#[^)]*)?\)", lambda m: f"]({'../' * depth}{m[1]}.ipynb)", text)
    return text


def unbroken(outputs):
    "Outputs whose tables keep a number, its spread and its p-value on one line."
    for data in (o.data for o in outputs if "data" in o):
        for kind in data.keys() & {"text/html", "text/markdown"}:
            text = re.sub(r"(?<=\d) ± ([\d.]+) (?=\()", "\u00a0±\u00a0\\1\u00a0", data[kind])
            data[kind] = text.replace("(p = ", "(p\u00a0=\u00a0")
    return outputs


def site_notebook(path, lookup):
    "One notebook as the site shows it: title, prose, pictures; exported cells become API entries."
    nb = nbformat.read(path, as_version=4)
    depth = len(path.relative_to(NBS).parts) - 1
    exports = [directives(c.source)[0].get("default_exp") for c in nb.cells if c.cell_type == "code"]
    module = next((importlib.import_module(f"aevlp.{e}") for e in exports if e), None)
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            text = lookup.linkify(re.sub(r"\A(# .*\n+)> (.*)", r"\1*\2*", cell.source))
            cells.append(nbformat.v4.new_markdown_cell(relink(text, depth)))
        elif cell.cell_type == "code":
            found, source = directives(cell.source)
            if found.keys() & {"hide", "default_exp", "exporti"}:
                continue
            if found.keys() & {"export"}:
                text = documented(source, module) if module else ""
                if text:
                    cells.append(nbformat.v4.new_markdown_cell(relink(lookup.linkify(text), depth)))
                continue
            cell.source = source
            cell.metadata["tags"] = ["remove-input"] if hidden(found, cell) else []
            cell.outputs = unbroken(cell.outputs)
            if source or cell.outputs:
                cells.append(cell)
            if picture := found.get("screenshot"):  # of widgets, which need a kernel
                cells.append(nbformat.v4.new_markdown_cell(relink(picture, depth)))
    nb.cells = cells
    nb.metadata.pop("widgets", None)  # the state of progress bars
    nb.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    return nb


def readme(out):
    "README.md from the index notebook; links and pictures as they are from the root."
    nb = nbformat.read(NBS / "index.ipynb", as_version=4)
    cells = []
    for cell in nb.cells:
        found, source = directives(cell.source)
        if cell.cell_type == "code":
            if "hide" in found:
                continue
            if hidden(found, cell):
                text = "\n\n".join(
                    o.data["text/markdown"] for o in cell.outputs if "text/markdown" in o.get("data", {})
                )
                cell = nbformat.v4.new_markdown_cell(text)
            else:
                cell.source = source
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"(\]\(|src=\")\.\./", r"\1", cell.source)
            cell.source = re.sub(r"\]\((?!https?:|#|nbs/)([\w/]+\.ipynb)", r"](nbs/\1", cell.source)
        cells.append(cell)
    nb.cells = cells
    nb.metadata["language_info"] = {"name": "python"}
    text, _ = MarkdownExporter().from_notebook_node(nb)
    Path(out).write_text(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", encoding="utf-8")


def vendor(static):
    "MathJax beside the pages, so that the site works offline; needs npm."
    if not shutil.which("npm"):
        print("npm is not installed: formulas will be loaded from the network")
        return False
    cache = BUILD / "npm"
    mathjax = cache / "node_modules/mathjax/es5"
    if not mathjax.exists():
        cache.mkdir(parents=True, exist_ok=True)
        install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", cache, "mathjax@3.2.2"]
        if subprocess.run(install, stdout=subprocess.DEVNULL).returncode:
            print("npm could not install MathJax: formulas will be loaded from the network")
            return False
    shutil.copytree(mathjax, static / "mathjax", dirs_exist_ok=True)
    return True


TUTORIALS = (
    "your_pictures",
    "tour",
    "explore",
    "review",
    "screens",
    "look_at_100",
    "reproduce",
    "cluster",
    "own_method",
)  # as one needs them


def toc(pages):
    "The site's table of contents, in reading order."

    def listed(folder, first=()):
        order = {name: i for i, name in enumerate(first)}
        found = [p for p in pages if p.parent.name == folder and p.parent != NBS]
        return sorted(found, key=lambda p: order.get(p.stem, len(order)))

    groups = {
        "Tutorials": listed("tutorials", TUTORIALS),
        "Reference": [p for p in pages if p.parent == NBS and p.name != "index.ipynb"],
        "The paper's tables and figures": listed("experiments"),
        "Background": listed("background"),
    }
    lines = []
    for caption, members in groups.items():
        if members:
            names = [str(p.relative_to(NBS).with_name(page_name(p)).with_suffix("")) for p in members]
            lines.append(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(names) + "\n```")
    return "\n\n".join(lines)


def site(strict):
    source, html = BUILD / "source", BUILD / "html"
    for old in (source, html):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(ROOT / "figures", source / "figures")
    pages = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    lookup = NbdevLookup()
    for path in pages:
        nb = site_notebook(path, lookup)
        if path == NBS / "index.ipynb":
            nb.cells.append(nbformat.v4.new_markdown_cell(toc(pages)))
        target = source / path.relative_to(NBS).with_name(page_name(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, target)
    for extra in ("conf.py", "scorer.js", "static"):
        where = ROOT / "docs" / extra
        (shutil.copytree if where.is_dir() else shutil.copy)(where, source / extra)
    offline = vendor(source / "static")
    env = {**os.environ, "AEVLP_DOCS_OFFLINE": "1" if offline else ""}
    flags = ["-W", "--keep-going", "-n"] if strict else []
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-d", BUILD / "doctrees", *flags, source, html]
    if subprocess.run(command, env=env).returncode:
        sys.exit("The site was not built: see the messages above.")
    broken = broken_links(html)
    if broken:
        print("Links to nowhere:", *broken, sep="\n  ")
        if strict:
            sys.exit(1)
    print(f"The site is in {html.relative_to(ROOT)}: open {(html / 'index.html').relative_to(ROOT)}")


class Targets(HTMLParser):
    "Collects what the links and pictures of a page point at."

    def __init__(self, text):
        super().__init__()
        self.found = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found |= {value.split("#")[0].split("?")[0] for key, value in attrs if key in ("href", "src") and value}


def broken_links(html):
    "Local links and pictures of the built pages that lead nowhere, as 'page -> target'."
    found = []
    for page in sorted(p for p in html.rglob("*.html") if "_static" not in p.parts):
        for target in sorted(Targets(page.read_text(encoding="utf-8")).found):
            local = target and not re.match(r"(?:[a-z]+:|//)", target)
            if local and not (page.parent / target).exists():
                found.append(f"{page.relative_to(html)} -> {target}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("readme").add_argument("--out", default=ROOT / "README.md")
    commands.add_parser("site").add_argument("--strict", action="store_true")
    args = parser.parse_args()
    readme(args.out) if args.command == "readme" else site(args.strict)
