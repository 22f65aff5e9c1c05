# ruff: noqa: RUF001
"""Guess the encoding of text that does not say it: names in a zip, lines of a table. Pure, no library is asked.

Every candidate decodes a sample of pieces (names, cells), each once. A reading is rated by how probable its letters
are in one language: how frequent they are there, whether scripts are mixed in a word, capitals stand behind small
letters, vowels and consonants take turns. Rates are logarithms, so those of two pieces add up. Worked example, the
bytes C9 BD: `gbk` reads a frequent character (-6.4), `utf-8` one letter of phonetic script (-12), `cp1252` a letter
and a fraction (-17). The best one is taken; if another one is nearly as probable, `is_sure` is False: ask people.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import log
from types import MappingProxyType
from unicodedata import category, normalize

from visionloop.errors import SourceError
from visionloop.ingest.paths.names import escape_name

MAX_PIECES = 400
MAX_PIECE = 80
MARGIN = 3.0
MIN_LETTERS, SEVERAL = 3, 1.2
POOR = -9.0  # per character beyond ASCII: no language
SHOWN = 3
# An apostrophe as English, French and Italian have it: don't, girl's, l'eau.
_APOSTROPHE = re.compile(r"\b(?:[dlnjcstm]|qu)’(?=[a-zà-ÿ])|[a-z]’(?:s|t|d|m|ll|re|ve)\b", re.IGNORECASE)
_NEVER = re.compile(r"ń[aeiouy]|[ďť][ei]")  # these letters make `ni`, `dě`, `tě` there
# Bytes that no encoding here uses as a part of another character.
_NO_CHARACTERS = ("Cc", "Cs")
_NO_TEXT = (*_NO_CHARACTERS, "Cn", "Co")  # unassigned, and for private use
_CUT = re.compile(rb"[\x00-\x2c\x2e-\x3f]+")

_LATIN_WEST = (
    *("éèàêçâôùîûœëïüæ", "üäöß", "óíáéñúü", "ãçáéóíêúâõôà", "àèùòìé", "äöåé", "åøæé", "ëïéèöü", "íáðéóþöúýæ"),
    "àéèçóíúòïü",
)
_LATIN_CENTRAL = (
    *("łżęąśóćńź", "íáéěřčýžšůúťďňó", "áíčéšžýúľťôňäďóĺŕ", "éáőöíóüűú", "ăîâșțşţ", "čćšžđ", "üäöß", "éèàêçâôîëï"),
)
_TURKISH = ("ışğüçöâî",)
_CYRILLIC = ("оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъё", "оаинвіертсклудмпязьбгчйхцюєїжшщфґ")
_GREEK = ("αοιετσνηυρπκμλςωάίόέύήώγδβχθφξζψϊϋ",)
_HEBREW = ("יוהלאמרתשבנםחקדעפןגכצטזסךףץ",)
_ARABIC = ("اليمنوترهبدسفعكقحجشةصطخضأذثزىظغءئإؤآ",)
_THAI = ("านรอกเงมยลวด่ท้สัติีะปบคุหแจพชขใูไ์ืโึ็ำผซธถศฉณญษฐฟภ",)
_OTHERS = ("ơưăâđêôáàảãạéèẻẽẹíìỉĩịóòỏõọúùủũụýỳỷỹỵ", "āīēšņļžģķčū", "õäöüšž", "ąčęėįšųūž")
# The characters that names of things are most often written with.
_CHINESE = (
    "的一是不了人我在有他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生自会那后能对着事其里所去行过家十用发天如"
    "然作方成者多日都三小军二无同么经法当起与好看学进种将还分此心前面又定见只主没公从动两长知样现理开美明问力四五六七八九百千"
    "万高新老车电化气体重民主部全表加进机场工业产品物类别标签数据图片像照训练测试验证集合其他未知正常异缺陷良坏合格"
    "猫狗鸟马牛羊猪鸡鸭鹅鱼兔鼠虎狮象猴熊狼蛇龟虫蝶蜂花草树木叶果苹梨桃橙蕉葡萄莓西瓜番茄土豆玉米麦稻茶叶船飞行摩托汽交火房屋"
    "楼桥路门窗桌椅书包衣服裤鞋帽杯瓶碗山水河海湖云雨雪雷风月星石金银铜铁红黄蓝绿白黑灰紫粉男女孩儿童手足头眼口耳鼻健康病害斑锈"
    "霉宠物动植建筑食品水果蔬菜春夏秋冬东南西北左右内外"
)
_CHINESE_OLD = (
    "的一是不了人我在有他這為之大來以個中上們到說國和地也子時道出而要於就下得可你年生自會那後能對著事其裡所去行過家十用發天如"
    "然作方成者多日都三小軍二無同麼經法當起與好看學進種將還分此心前面又定見只主沒公從動兩長知樣現理開美明問力四五六七八九百千"
    "萬高新老車電化氣體重民部全表加機場工業產品物類別標籤數據圖片像照訓練測試驗證集合其他未知正常異缺陷良壞合格"
    "貓狗鳥馬牛羊豬雞鴨鵝魚兔鼠虎獅象猴熊狼蛇龜蟲蝶蜂花草樹木葉果蘋梨桃橙蕉葡萄莓西瓜番茄玉米麥稻茶船飛摩托汽交火房屋樓橋路門窗"
    "桌椅書包衣服褲鞋帽杯瓶碗山水河海湖雲雨雪雷風月星石金銀銅鐵紅黃藍綠白黑灰紫粉男女孩兒童手足頭眼口耳鼻健康病害斑寵植建築食蔬"
    "菜春夏秋冬東南西北左右內外"
)
_JAPANESE = (
    "日一国人年大十二本中長出三時行見月分後前生五間上東四今金九入学高円子外八六下来気小七山話女北午百書先名川千水半男西電校語土木"
    "聞食車何南万毎白天母火右読友左休父雨犬猫鳥馬牛羊豚鶏魚兎鼠虎象猿熊狼蛇亀虫蝶花草樹葉果実桜梅松竹苺柿桃梨栗船飛機自転動物家屋"
    "橋門窓机椅海湖空雲雪風星石銀銅鉄赤黄青緑黒灰紫手足頭目口耳鼻正常異欠陥良不合格検査訓練画像写真分類種別他未知健康病害明暗新古"
    "春夏秋冬朝夜学習試験証用植建野菜料理服靴帽"
)
_KOREAN = (
    "이다는에의가을하고한지은로도를기사서어인자리시나해대정그아일있라수전스제부보들원구국장상게여주성과안신선동공조화세비중실위관물"
    "면오운문생용무소년모계회치개재경산마트내없연방유우학차분결만건단간미민되진현적통반러데르드니야말터각집군양영식외때작심행발음표"
    "것요역예바저파네럼크처토질살약품새강너교천입불금및종히체감출설형배타남할알림본직절법력명망료키호후임루복돼닭끼쥐랑코숭곰늑뱀거"
    "북꽃풀잎열매숭포딸박토창책눈람달별돌철빨간노란록검색라손머귀함량훈련증류병끼"
)
_PUNCTUATION = frozenset("€£§µ’‘“”„–—…«»°º№·。、「」（）！？：；，・ー々　′½²")


@dataclass(frozen=True)
class _Candidate:
    """An encoding, how rare it is in tables and in zips (logarithms), and the languages that use it."""

    encoding: str
    in_tables: float
    in_zips: float
    alphabets: Sequence[str] = ()
    han: str = ""


_ALL = (*_LATIN_WEST, *_LATIN_CENTRAL, *_TURKISH, *_OTHERS, *_CYRILLIC, *_GREEK, *_HEBREW, *_ARABIC, *_THAI)
_CANDIDATES = (
    _Candidate("utf-8", 4, 3, _ALL, "chinese japanese korean old"),
    _Candidate("cp1252", 0, -4, _LATIN_WEST),
    _Candidate("gbk", -1, 0, (), "chinese"),
    _Candidate("shift_jis", -1, 0, (), "japanese"),
    _Candidate("cp932", -1.5, -0.5, (), "japanese"),
    _Candidate("euc_kr", -1, 0, (), "korean"),
    _Candidate("cp949", -1.5, -0.5, (), "korean"),
    _Candidate("big5", -1.5, -0.5, (), "old"),
    _Candidate("cp1251", -1, -3, _CYRILLIC),
    _Candidate("cp1250", -2, -5, _LATIN_CENTRAL),
    _Candidate("mac_roman", -3, -4, _LATIN_WEST),
    _Candidate("cp437", -4, 0, _LATIN_WEST),
    _Candidate("cp850", -4, 0, _LATIN_WEST),
    _Candidate("cp866", -3, 0, _CYRILLIC),
    _Candidate("cp852", -4, 0, _LATIN_CENTRAL),
    _Candidate("koi8_r", -3, -4, _CYRILLIC),
    _Candidate("cp1253", -2, -4, _GREEK),
    _Candidate("cp737", -4, -1, _GREEK),
    _Candidate("cp1254", -2, -5, _TURKISH),
    _Candidate("cp857", -4, -1, _TURKISH),
    _Candidate("cp1255", -2, -5, _HEBREW),
    _Candidate("cp862", -4, -1, _HEBREW),
    _Candidate("cp1256", -2, -4, _ARABIC),
    _Candidate("cp874", -3, -3, _THAI),
    _Candidate("iso8859_2", -3, -6, _LATIN_CENTRAL),
    _Candidate("mac_cyrillic", -4, -4, _CYRILLIC),
    _Candidate("euc_jp", -3, -3, (), "kana"),
)


@dataclass(frozen=True)
class Reading:
    """How a sample reads in an encoding, and how probable that is (a logarithm, of all pieces)."""

    encoding: str
    rate: float
    texts: tuple[str, ...]

    @property
    def is_poor(self) -> bool:
        """Whether it is hardly a text of any language."""
        number = sum(c > "\x7f" for text in self.texts for c in text)
        return self.rate < POOR * max(1, number)


@dataclass(frozen=True)
class EncodingGuess:
    """Readings of a sample, the most probable first, each another text."""

    readings: Sequence[Reading]

    @property
    def best(self) -> Reading | None:
        """The most probable reading; None when no encoding fits."""
        return self.readings[0] if self.readings else None

    @property
    def is_sure(self) -> bool:
        """Whether no other reading is nearly as probable."""
        return len(self.readings) == 1 or self.readings[0].rate - self.readings[1].rate >= MARGIN

    def show(self, example: bytes, first: int = 0) -> list[str]:
        """Return how a name or a line reads, from the place `first` on: `猫/1.jpg in gbk`, `ﾃｨ/1.jpg in shift_jis`."""
        shown = {one.encoding: example.decode(one.encoding, "replace") for one in self.readings}
        texts = [f"{escape_name(' '.join(text.split()))[:60]} in {name}" for name, text in shown.items()]
        return texts[first : first + SHOWN]


def choose_example(data: Sequence[bytes]) -> bytes:
    """Return the line or name with most bytes beyond ASCII."""
    return max(data, key=lambda one: sum(byte > 127 for byte in one[:200]))[:200]


def cut_pieces(data: Iterable[bytes]) -> list[bytes]:
    """Return the words and cells of lines or names that have bytes beyond ASCII, each once, the first ones."""
    pieces: dict[bytes, None] = {}
    for line in data:
        if not line.isascii():
            pieces.update((part[:MAX_PIECE], None) for part in _CUT.split(line) if not part.isascii())
            if len(pieces) >= MAX_PIECES:
                break
    return [*pieces][:MAX_PIECES]


def guess_encoding(pieces: Sequence[bytes], *, in_zip: bool = False, but: Sequence[str] = ()) -> EncodingGuess:
    """Return how pieces read in the encodings that fit all of them, but for those named in `but`."""
    found: dict[tuple[str, ...], Reading] = {}
    for candidate in _CANDIDATES:
        if candidate.encoding in but:
            continue
        try:
            texts = tuple(normalize("NFC", _decode(piece, candidate.encoding)) for piece in pieces)
        except UnicodeDecodeError:
            continue
        is_utf8 = candidate.encoding == "utf-8"
        unknown = UTF8_UNKNOWN if is_utf8 else UNKNOWN
        rate = _rate_all(texts, _list_tables(candidate), unknown)
        # Newer emoji, and icons of fonts, hardly come by chance in UTF-8.
        if not any(_has_no_text(text, _NO_CHARACTERS if is_utf8 else _NO_TEXT) for text in texts):
            rate += candidate.in_zips if in_zip else candidate.in_tables
            if texts not in found or found[texts].rate < rate:
                found[texts] = Reading(candidate.encoding, rate, texts)
    return EncodingGuess(sorted(found.values(), key=lambda one: -one.rate))


def make_encoding_question(where: str, found: str, guess: EncodingGuess, example: bytes, command: str) -> SourceError:
    """Return the error that asks which of the most probable encodings is meant, with the commands that answer."""
    names = [one.encoding for one in guess.readings[:SHOWN]] or ["NAME"]
    commands = " or ".join(f"`{command} --encoding {name}`" for name in names)
    shown = "; ".join(guess.show(example)) or f"{example[:60]!r}, which fits none that we know"
    expected = "the encoding that reads right"
    return SourceError(where, f"{found}, such as {shown}", expected, f"Say {commands} (in params.yaml: `encoding`).")


def _decode(piece: bytes, encoding: str) -> str:
    """Decode a piece; its end may be cut in the middle of a character."""
    try:
        return piece.decode(encoding)
    except UnicodeDecodeError as exc:
        if len(piece) < MAX_PIECE or exc.start < MAX_PIECE - 4:
            raise
        return piece[: exc.start].decode(encoding)


def _has_no_text(text: str, categories: Sequence[str]) -> bool:
    return any(category(c) in categories for c in text if c > "\x7f")


def _list_tables(candidate: _Candidate) -> list[Mapping[str, float]]:
    return [*map(_rank_letters, candidate.alphabets), *map(_rank_characters, candidate.han.split())]


@cache
def _rank_letters(alphabet: str) -> Mapping[str, float]:
    """Return the logarithm of each letter's share by its rank; capitals are rarer."""
    total = sum(1 / (rank + 2) for rank in range(len(alphabet)))
    rates = {letter: log(1 / (rank + 2) / total) for rank, letter in enumerate(alphabet)}
    capitals = {letter.upper(): rate - 2 for letter, rate in rates.items() if len(letter.upper()) == 1}
    return MappingProxyType({**capitals, **rates})


@cache
def _rank_characters(language: str) -> Mapping[str, float]:
    """Return the same for a writing of many characters: frequent ones, then those of its standard, level by level."""
    levels: tuple[tuple[int, int, float], ...]
    kana = {chr(c): -4.2 for c in range(0x3041, 0x30FD)}
    if language == "korean":
        levels, frequent, other = ((0xB0, 0xC9, -8.8),), dict.fromkeys(_KOREAN, -5.8), {}
        codec = "euc_kr"
    elif language in ("japanese", "kana"):
        levels, frequent = ((0x88, 0x98, -8.8), (0x98, 0xEB, -11.5)), dict.fromkeys(_JAPANESE, -6.4)
        codec, other = "shift_jis", {**kana, **{chr(c): -9.0 for c in range(0xFF66, 0xFFA0)}}
        if language == "kana":  # EUC-JP is rare: only for texts that have kana
            levels, frequent = ((0x88, 0x98, -10.0),), {}
    elif language == "old":
        levels, frequent, other = ((0xA4, 0xC7, -8.8), (0xC9, 0xFA, -11.5)), dict.fromkeys(_CHINESE_OLD, -6.4), {}
        codec = "big5"
    else:
        levels, frequent, other = ((0xB0, 0xD8, -8.8), (0xD8, 0xF8, -11.5)), dict.fromkeys(_CHINESE, -6.4), {}
        codec = "gb2312"
    standard: dict[str, float] = {}
    for start, end, rate in levels:
        for lead in range(start, end):
            for trail in range(0x40, 0xFF):
                text = bytes((lead, trail)).decode(codec, "ignore")
                if len(text) == 1 and text > "\x7f":
                    standard.setdefault(text, rate)
    return MappingProxyType({**standard, **other, **frequent})


def _rate_all(texts: Sequence[str], tables: Sequence[Mapping[str, float]], unknown: "_Unknown") -> float:
    """Return the rate of all pieces in one language, or in several, which is rarer."""
    rates = [[_rate(text, table, unknown) for text in texts] for table in tables]
    best: list[float] = [max(of_piece) for of_piece in zip(*rates, strict=True)]
    languages: list[float] = [sum(of_language) for of_language in rates]
    return max(sum(best) - SEVERAL * (len(texts) + 1), *languages)


def _rate(text: str, table: Mapping[str, float], unknown: "_Unknown") -> float:
    rate = 0.0
    for i, c in enumerate(text):
        if c <= "\x7f":
            continue
        if (of_table := table.get(c)) is not None:
            rate += of_table
        elif c in _PUNCTUATION:
            rate -= 5.5
        else:
            rate += unknown.rate(c)
        before, after = text[i - 1 : i] if i else "", text[i + 1 : i + 2]
        rate -= _rate_neighbours(c, before) + _rate_neighbours(c, after)
        if (before.islower() and c.isupper()) or (c.islower() and after.isupper()):
            rate -= 5
        elif before.isupper() and c.isupper() and after.islower():
            rate -= 4
    rate += 5 * len(_APOSTROPHE.findall(text)) - 3 * len(_NEVER.findall(text))
    return rate + _rate_word(text)


def _rate_word(text: str) -> float:
    """Return what a word of few letters, or of accented letters alone, or of two scripts costs."""
    letters = [c for c in text if _is_letter(c)]
    others = [c for c in letters if c > "\x7f"]
    if not others or _find_script(others[0]) == "han":
        return 0.0
    rate = -3.0 if len(letters) < MIN_LETTERS else 0.0
    if len(others) == len(letters) and max(others) < "\u0250":
        return -6.0
    return rate - 2.0 * (len(others) < len(letters) and min(others) >= "\u0250")


@dataclass(frozen=True)
class _Unknown:
    """What a character costs that no alphabet holds: a letter of two bytes in UTF-8, one of three, any other."""

    short: float
    long: float
    other: float

    def rate(self, c: str) -> float:
        """Return the logarithm for a character."""
        if not _is_letter(c):
            return self.other
        return self.short if c < "\u0800" else self.long


UNKNOWN = _Unknown(-12.0, -13.0, -13.0)
UTF8_UNKNOWN = _Unknown(-11.0, -7.0, -5.5)  # any script may be in UTF-8


def _rate_neighbours(c: str, other: str) -> float:
    """Return what it costs that a character stands beside another one."""
    if not _is_letter(other):
        return 0.0
    if not _is_letter(c):
        return 0.0 if c in "’·" else 3.0
    one, two = _find_script(c), _find_script(other)
    if one != two:
        return 2.5 if "han" in (one, two) else 7.0
    return _rate_accent(c, other) if one == "latin" else 0.0


def _rate_accent(c: str, other: str) -> float:
    if other > "\x7f":
        return 0.7
    if _is_vowel(c):
        return 0.5 if _is_vowel(other) and c not in "œæ" else 0.0
    return 0.0 if _is_vowel(other) else 0.8


def _is_letter(c: str) -> bool:
    return bool(c) and (c.isalpha() or category(c)[0] == "M")


@cache
def _is_vowel(letter: str) -> bool:
    return normalize("NFD", letter)[0].lower() in "aeiouyæøœı"


@cache
def _find_script(c: str) -> str:
    code = ord(c)
    borders = ((0x250, "latin"), (0x370, "marks"), (0x400, "greek"), (0x530, "cyrillic"), (0x600, "hebrew"))
    for end, script in (*borders, (0x900, "arabic"), (0x1E00, "thai"), (0x1F00, "latin"), (0x2E00, "signs")):
        if code < end:
            return script
    return "han"
