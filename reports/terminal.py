"""Terminal output that shows any text literally."""

from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.status import Status
from rich.text import Text

from linflab.reports.plain import escape_invisible, escape_unencodable

_LAYOUT = "\n\t"


class PlainConsole(Console):
    """Console that ignores markup and emoji codes, and escapes control characters.

    Letters that the output encoding lacks are replaced by ASCII.
    """

    def __init__(self, file: IO[str] | None = None, **options: Any) -> None:
        super().__init__(file=file, **{"highlight": False, "markup": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """Return text as it is shown; every string passes through here."""
        return super().render_str(self._escape(text), **{**options, "markup": False, "emoji": False})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Return the segments to write, with escapes in text that was not given as a string.

        Rich measures such text before it is escaped, so the escaped text may be truncated. Use `Styled` for text with a
        style.
        """
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(self._escape(segment.text), segment.style)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """Return a spinner with a text next to it."""
        return super().status(Text(self._escape(status)) if isinstance(status, str) else status, **options)

    def with_width(self, width: int) -> "PlainConsole":
        """Return a console of another width on the same output; the terminal may wrap its lines."""
        return PlainConsole(self.file, width=width, force_terminal=self.is_terminal)

    def _escape(self, text: str) -> str:
        return escape_unencodable(escape_invisible(text, keep=_LAYOUT), self.encoding)


class Styled:
    """Text with a style that is measured after escaping; rich measures its own `Text` before."""

    def __init__(self, text: str, style: str = "") -> None:
        self.text = text
        self.style = style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield console.render_str(self.text, style=self.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, console.render_str(self.text))
