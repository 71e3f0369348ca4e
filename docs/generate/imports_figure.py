"""Picture of the imports between the parts of linflab, drawn from the source."""

import ast
from collections.abc import Iterable
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARK = "<!-- imports -->"
PACKAGES = ("models", "search_spaces", "reports")
BASE = ("source", "files", "extras", "locks", "signals", "host", "errors")
ROW, BOX, GAP, WIDTH = 58, 34, 14, 660


def read_imports() -> dict[str, set[str]]:
    """Return the parts that each part of `platform/` imports, and the other packages that it imports."""
    imports: dict[str, set[str]] = {}
    for file in (ROOT / "platform").rglob("*.py"):
        part = file.relative_to(ROOT / "platform").with_suffix("").parts[0]
        names = {
            name.split(".")[1:3] and (name.split(".")[2] if name.split(".")[1] == "platform" else name.split(".")[1])
            for name in _imported_names(ast.parse(file.read_text()))
            if name.startswith("linflab.") and name.count(".") >= 2
        }
        imports.setdefault(part, set()).update(names - {part})
    return imports


def layers(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return the parts in layers from top to bottom; each imports only parts of later layers."""
    parts = {part for part in imports if part not in BASE}

    def depth(part: str) -> int:
        importers = [other for other in parts if part in imports[other]]
        return 1 + max(map(depth, importers), default=-1)

    depths = {part: depth(part) for part in parts}
    return [sorted(part for part in parts if depths[part] == level) for level in range(max(depths.values()) + 1)]


def reduce_transitively(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the imports without those that follow from others, which would hide the rest."""

    def reachable(part: str) -> set[str]:
        direct = imports.get(part, set()) - set(BASE)
        return direct.union(*map(reachable, direct)) if direct else set()

    return {
        part: {target for target in targets if not any(target in reachable(other) for other in targets - {target})}
        for part, targets in imports.items()
        if part not in BASE
    }


def draw_svg() -> str:
    """Return the picture as inline SVG, in the colors of the page."""
    imports = read_imports()
    rows = [*layers(imports), [*BASE], [*PACKAGES]]
    centers: dict[str, tuple[float, float]] = {}
    boxes, arrows = [], []
    for level, row in enumerate(rows):
        width = min(120, (WIDTH - GAP * (len(row) - 1)) / len(row))
        start = (WIDTH - len(row) * width - GAP * (len(row) - 1)) / 2
        for index, part in enumerate(row):
            x, y = start + index * (width + GAP), level * ROW + 8
            centers[part] = (x + width / 2, y)
            boxes.append(
                f'<rect class="part" x="{x:.0f}" y="{y}" width="{width:.0f}" height="{BOX}" rx="5"/>'
                f'<text x="{x + width / 2:.0f}" y="{y + 22}">{escape(part + ("/" if part in PACKAGES else ""))}</text>'
            )
    for part, targets in reduce_transitively(imports).items():
        for target in sorted(targets & (set(centers) - set(BASE) - set(PACKAGES))):
            if part in centers and part not in BASE:
                (x1, y1), (x2, y2) = centers[part], centers[target]
                arrows.append(f'<line x1="{x1:.0f}" y1="{y1 + BOX}" x2="{x2:.0f}" y2="{y2 - 3}"/>')
    height = len(rows) * ROW
    return (
        f'<figure class="imports"><svg viewBox="-1 0 {WIDTH + 2} {height}" role="img" '
        'aria-label="Imports between the parts of linflab">'
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0 0 8 4 0 8z"/></marker></defs>{"".join(arrows)}{"".join(boxes)}</svg></figure>\n'
    )


def _imported_names(tree: ast.Module) -> Iterable[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
