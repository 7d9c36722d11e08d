"""Draws 40 pictures of a data set in RSTPReid's layout with captions: contact_sheet.py DATA_DIR OUT.jpg."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLUMNS, ROWS = 8, 5
PICTURE, CELL, MARGIN = (156, 312), (200, 446), 8
FONT_SIZE, LINE, CHARACTERS, LINES = 12, 13, 30, 9


def contact_sheet(data: Path, out: Path) -> None:
    """Write the sheet: one picture and its first caption for each of 40 records spread over the data set."""
    records = json.loads((data / "data_captions.json").read_text(encoding="utf-8"))
    count = min(COLUMNS * ROWS, len(records))
    chosen = [records[index * len(records) // count] for index in range(count)]
    sheet = Image.new("RGB", (COLUMNS * CELL[0] + MARGIN, ROWS * CELL[1] + MARGIN), "white")
    ink, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for position, record in enumerate(chosen):
        x, y = MARGIN + position % COLUMNS * CELL[0], MARGIN + position // COLUMNS * CELL[1]
        with Image.open(data / "imgs" / record["img_path"]) as image:
            sheet.paste(image.resize(PICTURE, Image.Resampling.BICUBIC), (x + (CELL[0] - PICTURE[0]) // 2, y))
        lines = textwrap.wrap(record["captions"][0], CHARACTERS, max_lines=LINES)
        for number, line in enumerate(lines):
            ink.text((x, y + PICTURE[1] + 4 + number * LINE), line, fill="black", font=font)
    sheet.save(out, quality=72, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    contact_sheet(Path(sys.argv[1]), Path(sys.argv[2]))
