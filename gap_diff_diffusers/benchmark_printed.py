"""The values that GAP-Diff's authors print, to stand beside ours: facts from the slides of NDSS 2025.

FDFR in percent, ISM, BRISQUE and SER-FIQ (`metrics.paper.FIGURES`) for each of four prompts. Of Stable Diffusion 2.1,
attacked by DreamBooth, with RetinaFace and ArcFace; so the levels are not comparable with those of other models,
detectors or embeddings, only the order of the methods. The slides label neither table; the first is most likely of
photos after JPEG 70.
"""

PROMPTS = {
    "A": "a photo of {}",
    "B": "a dslr portrait of {}",
    "C": "a photo of {} looking at the mirror",
    "D": "a photo of {} in front of eiffel tower",
}
_FIRST = """
No defense   5.33/.61/26.27/.69 21.57/.48/ 9.64/.71  8.67/.44/19.61/.56 20.67/.22/20.11/.44
PhotoGuard   6.22/.55/29.38/.71 19.44/.46/13.74/.71  9.67/.40/23.43/.56 19.56/.21/17.91/.45
Glaze        6.57/.53/30.42/.69 18.78/.45/11.04/.69  9.33/.41/19.69/.55 17.44/.20/19.78/.43
Mist        14.89/.46/35.68/.60 19.56/.38/20.43/.63 12.33/.35/22.17/.50 27.33/.18/21.05/.36
Anti-DB     22.89/.41/40.19/.40 32.67/.34/32.72/.44 21.67/.30/24.77/.37 34.88/.14/31.21/.26
ACE          8.44/.47/37.22/.61 15.22/.38/27.80/.64 12.44/.30/31.90/.42 36.11/.15/25.25/.26
MetaCloak   31.69/.44/38.82/.51 35.28/.36/27.31/.56 32.76/.32/34.14/.36 30.57/.15/31.22/.25
CAAT        25.44/.43/42.01/.45 21.67/.38/25.07/.57 16.33/.32/23.82/.37 34.22/.14/31.82/.25
SimAC       19.11/.49/39.43/.52 23.56/.41/24.15/.62 14.89/.33/31.09/.42 28.56/.14/32.98/.25
GAP-Diff    77.56/.25/42.04/.23 76.33/.19/48.97/.20 84.56/.14/47.30/.13 72.78/.08/41.69/.08
"""
_SECOND = """
PhotoGuard   4.78/.55/32.72/.70 22.89/.44/ 9.52/.68  4.33/.39/20.76/.55 19.56/.21/17.91/.45
Glaze        4.89/.56/30.81/.71 23.11/.43/ 8.76/.68  6.89/.40/20.71/.56 20.56/.20/20.34/.44
Mist        10.89/.52/34.92/.69 21.22/.42/12.02/.68  7.78/.37/22.69/.51 21.56/.18/20.91/.38
Anti-DB     10.44/.50/36.45/.57 23.00/.39/19.33/.62 17.78/.32/14.82/.42 26.89/.17/28.11/.28
ACE          7.55/.51/37.94/.68 17.67/.38/21.24/.67  7.89/.32/28.09/.48 32.56/.16/22.97/.31
MetaCloak   32.16/.46/40.05/.54 38.25/.41/27.76/.60 28.40/.33/33.87/.38 24.73/.17/30.89/.27
CAAT        10.44/.52/37.50/.61 17.44/.42/13.90/.65 11.11/.36/13.17/.46 28.33/.18/27.84/.31
SimAC       10.22/.51/37.19/.65 18.89/.43/14.60/.67  7.22/.36/26.90/.49 20.67/.18/27.57/.35
GAP-Diff    62.44/.32/45.85/.35 64.80/.24/49.78/.27 76.73/.22/52.93/.15 58.61/.11/44.67/.15
"""
_PREPROCESSED = """
GAP-Diff, then nothing           95.22/.12/45.73/.06 87.67/.16/42.44/.11 94.11/.09/45.93/.05 77.00/.07/41.15/.06
GAP-Diff, then noise             26.44/.41/29.41/.49 35.33/.31/36.30/.45 30.46/.28/34.73/.32 24.89/.12/26.89/.32
GAP-Diff, then blur              83.78/.24/42.25/.18 82.44/.19/46.67/.12 86.11/.14/44.71/.09 73.11/.08/43.90/.07
GAP-Diff, then quantization      93.89/.11/43.44/.06 85.44/.15/43.05/.12 94.00/.11/46.63/.05 77.33/.08/41.06/.06
GAP-Diff, then resizing          90.56/.17/42.50/.12 82.67/.17/41.89/.15 87.11/.18/46.16/.09 78.33/.08/41.34/.06
GAP-Diff, then super-resolution  93.67/.13/42.82/.10 85.22/.16/42.75/.15 90.11/.15/49.24/.08 78.44/.09/40.43/.07
"""


def _read(text: str) -> dict[str, dict[str, tuple[float, ...]]]:
    """{method: {prompt's letter: the four figures}}."""
    rows = {}
    for line in text.strip().splitlines():
        numbers = line.replace("/ ", "/").split()[-len(PROMPTS) :]
        method = line[: line.index(numbers[0])].strip()
        rows[method] = dict(zip(PROMPTS, (tuple(map(float, cell.split("/"))) for cell in numbers), strict=True))
    return rows


TABLES = {
    "first table": _read(_FIRST),
    "second table": _read(_SECOND),
    "preprocessing": _read(_PREPROCESSED),
}
"""{table: {method: {prompt's letter: the figures}}}."""
COSTS = (
    ("PhotoGuard", "194", "16"),
    ("Glaze", "118", "4"),
    ("Mist", "294", "5"),
    ("Anti-DB", "308", "18"),
    ("ACE", "175", "6"),
    ("MetaCloak", "1.1e4", "504"),
    ("CAAT", "98", "18"),
    ("SimAC", "1.2e3", "33"),
    ("GAP-Diff", ".04", "2"),
)
"""Methods with the seconds and GB that protecting takes, as they stand there."""


def letter(prompt: str, subject: str) -> str | None:
    """Which of the four prompts this is, of a person who is called that; None if it is another."""
    return next((name for name, pattern in PROMPTS.items() if prompt == pattern.replace("{}", subject)), None)
