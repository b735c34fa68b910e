"""HTML of pages, as files in a folder or together in one file.

Whatever is shown is escaped. A page's content policy allows pictures, the style and the one script of the folder, and
nothing else; a single file holds its pictures in its style, each once, and allows itself only.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from PIL import Image

from crp.image.colours import AGAINST, FOR, POWER
from crp.image.forms import YELLOW
from crp.image.texts import OPACITY
from crp.visualization.report.addresses import relative
from crp.visualization.table.files import write_atomic
from crp.wording import counted, percent

#: Where names of layers and files may be broken: ``blocks.5.``, ``attn``; ``ship/``, ``400.``, ``png``; no numbers.
_BREAKS = re.compile(r"(?<=[./])(?=[^\W\d])|(?<=/)(?=\d)")
#: Steps of the colours of tokens, from 0 to the full colour.
TONES = 20
_TYPES = {".webp": "image/webp", ".png": "image/png"}


class Renderer:
    """Renderer of pages into a folder.

    They show pictures, or else texts; where these are ``pixelated``, they are smaller than on the screen.
    """

    single = False
    #: Whether a page is by itself, with nothing else to go to.
    alone = False

    def __init__(self, folder: Path, footer: str, pixelated: bool, pictures: bool = True) -> None:
        self.folder, self.footer, self.pixelated = folder, footer, pixelated
        self.written: set[str] = set()
        from jinja2 import Environment, PackageLoader, StrictUndefined

        self._environment = Environment(
            loader=PackageLoader("crp.visualization.report", "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters |= {"percent": percent, "counted": counted, "breaking": _breaking}
        self._environment.globals["outline"] = _hex(YELLOW)
        colours = [_hex(AGAINST), "#ffffff", _hex(FOR)]
        self._environment.globals |= {"pictures": pictures, "tones": _tones()}
        self._environment.globals["colours"] = list(zip((0, 0.5, 1), colours, strict=True))
        self._address = ""
        self._rules: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        self._environment.globals |= {
            "to": self.link,
            "src": self._source,
            "crop": self._crop,
            "cell": self._cell,
            "margins": self._margins,
            "single": self.single,
        }

    def page(self, address: str, template: str, title: str, **content: Any) -> None:
        """Render a page and write it, unless the file is the same already."""
        self._address, self._rules = address, {}
        body = self._environment.get_template(template).render(**content)
        style = "".join(self._rules.values())
        policy = "default-src 'none'; img-src 'self' data:; script-src 'self'; form-action 'self'; style-src 'self'"
        policy += f" 'sha256-{_sha(style)}'" if style else ""
        self._write(address, self._frame(title, body, style, policy))

    def finish(self) -> Path:
        """Write what pages share, and tell the first page."""
        self._write("atlas.css", self._environment.get_template("atlas.css").render())
        self._write("atlas.js", self._script())
        return self.folder / "index.html"

    def link(self, address: str) -> str:
        """Address of a page or file, as the page that is being rendered links to it."""
        return relative(address, self._address)

    def _frame(self, title: str, body: str, style: str, policy: str, script: str = "") -> str:
        return self._environment.get_template("frame.html").render(
            title=title,
            body=Markup(body),
            style=Markup(style),
            policy=policy,
            script=Markup(script),
            pixelated=self.pixelated,
            alone=self.alone,
            footer=self.footer,
        )

    def _source(self, address: str, classes: str = "") -> Markup:
        # (addresses are safe: layers are in them by their slugs)
        return Markup(f'src="{self.link(address)}"' + (f' class="{classes}"' if classes else ""))

    def _crop(self, place: tuple[float, float, float]) -> str:
        """Class of the style that shows only a square part of a tile."""
        left, top, side = (round(100 * value) for value in place)
        name = f"k{left}-{top}-{side}"
        self._rules[name] = f".{name}{{--z:{100 / max(side, 1):.3g};--x:-{left}%;--y:-{top}%}}"
        return name

    def _cell(self, number: int, cells: int) -> str:
        """Class of the style that shows one of the heatmaps of a file."""
        name = f"h{number}-{cells}"
        self._rules[name] = f".{name}{{width:{100 * cells}%;left:{-100 * number}%}}"
        return name

    def _margins(self, picture: str) -> str:
        """Class of the style that tells the margins beside a picture, which is shown in a square; none of a square."""
        if picture not in self._shapes:
            with Image.open(self.folder / picture) as file:
                self._shapes[picture] = file.size
        largest = max(self._shapes[picture])
        across, down = (round(500 * (1 - length / largest)) for length in self._shapes[picture])
        if not across and not down:
            return ""
        name = f"m{down}-{across}"
        self._rules[name] = f".{name}{{--m:{down / 10:g}% {across / 10:g}%}}"
        return name

    def _script(self) -> str:
        environment = self._environment
        assert environment.loader is not None
        return environment.loader.get_source(environment, "atlas.js")[0]

    def _write(self, address: str, text: str) -> None:
        path = self.folder / address
        content = text.encode("utf-8", "replace")
        self.written.add(address)
        if not (path.is_file() and path.read_bytes() == content):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)


class SingleRenderer(Renderer):
    """Renderer of all pages into one file at ``path``, in which a page is shown when its address is asked for.

    Pictures and heatmaps are in the folder.
    """

    single = True

    def __init__(self, folder: Path, footer: str, pixelated: bool, pictures: bool, path: Path, title: str) -> None:
        super().__init__(folder, footer, pixelated, pictures)
        self.path, self.title = path, title
        self._pictures: dict[str, str] = {}
        self._sections: list[str] = []
        self._styles: dict[str, str] = {}

    def page(self, address: str, template: str, title: str, **content: Any) -> None:
        """Render a page as a section of the file."""
        self._address, self._rules = address, {}
        body = self._environment.get_template(template).render(**content)
        first = " first" if address == "index.html" else ""
        self._sections.append(f'<section class="page{first}" id="{Markup.escape(address)}">\n{body}\n</section>')
        self._styles |= self._rules

    def finish(self) -> Path:
        """Write the file."""
        style = self._environment.get_template("atlas.css").render() + "".join(self._styles.values())
        for address, name in self._pictures.items():
            path = self.folder / address
            content = base64.b64encode(path.read_bytes()).decode("ascii")
            style += f'.{name}{{content:url("data:{_TYPES[path.suffix]};base64,{content}")}}'
        script = self._script()
        policy = f"default-src 'none'; img-src data:; style-src 'sha256-{_sha(style)}'; "
        policy += f"script-src 'sha256-{_sha(script)}'"
        text = self._frame(self.title, "\n".join(self._sections), style, policy, script)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, text.encode("utf-8", "replace"))
        return self.path

    def link(self, address: str) -> str:
        """Address of a page within the file."""
        return "#" + address

    def _source(self, address: str, classes: str = "") -> Markup:
        name = self._pictures.setdefault(address, f"i{len(self._pictures)}")
        return Markup(f'class="{f"{name} {classes}".strip()}"')


def _tones() -> list[tuple[str, str]]:
    """Style of every colour of tokens, with its colour."""
    found = []
    for kind, colour in (("p", FOR), ("n", AGAINST)):
        for step in range(1, TONES + 1):
            opacity = OPACITY * (step / TONES) ** POWER
            found.append((f"{kind}{step}", _hex(tuple(1 - opacity * (1 - part) for part in colour))))
    return found


def _sha(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _hex(colour: tuple[float, ...]) -> str:
    return "#" + "".join(f"{round(255 * value):02x}" for value in colour)


def _breaking(name: object) -> Markup:
    """A name that is broken between its parts, where it is too long for a line."""
    return Markup("<wbr>").join(map(escape, _BREAKS.split(str(name))))
