"""Checks the built documentation: generated pages have their content, and every link within the site leads somewhere.

python .ci/check_site.py docs/_build
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

site = Path(sys.argv[1]).resolve()
assert "IQ4_XS" in (site / "gguf.html").read_text(), "gguf.html lacks the table of formats"
assert (site / "report.html").exists(), "report.html is missing"
pages = list(site.rglob("*.html"))
anchors = {page: set(re.findall(r'id="([^"]+)"', page.read_text())) for page in pages}
broken = []
for page in pages:
    for target in re.findall(r'href="([^"]+)"', page.read_text()):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or target.startswith("//") or "_static" in path:
            continue
        other = (page.parent / path).resolve() if path else page
        if not other.exists() or (anchor and other in anchors and anchor not in anchors[other]):
            broken.append(f"{page.name}: {target}")
if broken:
    sys.exit("\n".join(["links that lead nowhere:", *broken]))
print(f"{len(pages)} pages, every link within them leads somewhere")
