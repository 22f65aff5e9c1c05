# ruff: noqa: RUF001
"""The encoding of a text that does not say it: guessed by how it reads, told, asked about where two read as well."""

import random
import shlex
import unicodedata
import zipfile
from pathlib import Path

import pytest

from source_runs import run_source, touch
from visionloop.errors import SourceError
from visionloop.ingest.encodings import cut_pieces, guess_encoding

WORDS = {
    "gbk": "猫 狗 鸟 山 水 汽车 飞机 苹果 香蕉 正常 缺陷 花 树 马 牛 老虎 大象 房屋 红色 健康",
    "big5": "貓 狗 鳥 山 水 汽車 飛機 蘋果 香蕉 正常 缺陷 花 樹 馬 牛 老虎 大象 房屋 紅色 健康",
    "shift_jis": "犬 猫 鳥 山 水 自動車 飛行機 りんご バナナ 正常 不良 花 木 馬 牛 トラ ゾウ 家 赤 イヌ ネコ うさぎ",
    "euc_kr": "개 고양이 새 산 물 자동차 비행기 사과 바나나 정상 불량 꽃 나무 말 소 호랑이 코끼리 집 빨강 강아지",
    "cp1251": "кошка собака птица гора вода машина самолёт яблоко банан норма брак цветок дерево Лошадь Корова тигр",
    "cp866": "кошка собака птица гора вода машина самолёт яблоко банан норма брак цветок дерево Лошадь Корова тигр",
    "cp1250": "gęś żaba słoń jabłko koń róża dąb źrebię żółw świnia ćma łódź",
    "cp852": "kočka ptáček hřebec řeka květina kůň žába želva žlutá kráva",
    "cp1252": "élan forêt poème bébé château zèbre éléphant français hôtel été chêne noël",
    "mac_roman": "Bär Vögel Müll Häuser Straße Grün Möwe Löwe Kühe schön Mäuse",
    "cp1253": "γάτα σκύλος πουλί βουνό νερό αυτοκίνητο μήλο λουλούδι δέντρο άλογο",
    "cp1256": "قط كلب طائر جبل ماء سيارة تفاحة زهرة شجرة حصان",
    "utf-8": "猫 кошка café gęś γάτα 고양이 ねこ mèo بيت 😀ok कुत्ता cafe\u0301 a\u00a0b",
}


MIXED = "château Müll niño forêt Bär français Straße león"  # one language alone has not all of these


@pytest.mark.parametrize("encoding", ["cp1252", "mac_roman", "cp850"])
def test_words_of_several_languages_are_read_in_one_encoding(encoding: str) -> None:
    guess = guess_encoding(cut_pieces(word.encode(encoding) for word in MIXED.split()), in_zip=encoding == "cp850")
    assert guess.is_sure
    assert guess.readings[0].texts == tuple(MIXED.split())


@pytest.mark.parametrize("number", [2, 6])
@pytest.mark.parametrize("in_zip", [False, True])
def test_words_of_many_languages_are_read_right_or_asked_about(number: int, in_zip: bool) -> None:
    picks = random.Random(7)
    total = wrong = asked = 0
    for encoding, words in WORDS.items():
        for _ in range(40):
            pieces = cut_pieces(word.encode(encoding) for word in picks.sample(words.split(" "), number))
            guess = guess_encoding(pieces, in_zip=in_zip)
            total += 1
            asked += not guess.is_sure
            truth = [piece.decode(encoding) for piece in pieces]
            best = guess.best.texts if guess.best else ()
            wrong += guess.is_sure and best != tuple(map(compose, truth))
    assert wrong <= (0.02 if number == 2 else 0) * total
    assert asked <= (0.12 if number == 2 else 0.02) * total


def compose(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def write(home: Path, data: bytes, name: str = "labels.csv") -> None:
    touch(home, [f"{i}.jpg" for i in range(1, 30)])
    (home / name).write_bytes(data)


@pytest.mark.parametrize("encoding", [name for name in WORDS if name != "utf-8"])
@pytest.mark.parametrize("name", ["labels.csv", "labels.jsonl", "labels.json"])
def test_tables_are_read_in_the_encoding_that_reads_best(tmp_path: Path, encoding: str, name: str) -> None:
    words = WORDS[encoding].split(" ")[:8]
    if name == "labels.csv":
        text = "file,label\n" + "".join(f"{i}.jpg,{word}\n" for i, word in enumerate(words, start=1))
    else:
        rows = [f'{{"file": "{i}.jpg", "label": "{word}"}}' for i, word in enumerate(words, start=1)]
        text = "\n".join(rows) if name == "labels.jsonl" else f"[{','.join(rows)}]"
    write(tmp_path, text.encode(encoding), name)
    found = run_source(tmp_path, kind="table", path=name)
    assert [item.labels for item in found.items] == [(word,) for word in words]
    shown = {"cp1252": "Windows-1252"}.get(encoding, encoding)
    assert f"so taken as {shown}, as in '" in found.told[0]
    assert " in " in found.told[0].partition("' (")[2], "how others read it"
    assert len([line for line in found.told if "not UTF-8" in line]) == 1


UTF8_WORDS = ["猫", "кошка", "café", "cafe\u0301", "mèo", "😀", "é", "٣", "a\u00a0b", "कुत्ता"]
UNKNOWN_CHARACTERS = ["\U0001fae9", "x\ue000", "\U000e0001"]  # newer than Python's tables, of private use, unassigned


@pytest.mark.parametrize("text", [*UTF8_WORDS, *UNKNOWN_CHARACTERS])
def test_utf8_stays_utf8(tmp_path: Path, text: str) -> None:
    write(tmp_path, f"file,label\n1.jpg,{text}\n2.jpg,dog\n".encode())
    found = run_source(tmp_path, kind="table", path="labels.csv")
    assert found.items[0].labels == (compose(text),)
    assert not any("UTF-8" in line for line in found.told)


def test_utf8_by_chance_is_seen_over_the_whole_table(tmp_path: Path) -> None:
    write(tmp_path, "file,label\n1.jpg,山\n2.jpg,狗\n3.jpg,汽车\n".encode("gbk"))
    assert "山".encode("gbk").decode("utf-8") == "\u027d"
    found = run_source(tmp_path, kind="table", path="labels.csv")
    assert [item.labels for item in found.items] == [("山",), ("狗",), ("汽车",)]


@pytest.mark.parametrize(("word", "encoding"), [("kočka", "cp1250"), ("forêt", "cp1252"), ("狗狗", "gbk")])
def test_two_readings_that_are_as_good_are_asked_about(tmp_path: Path, word: str, encoding: str) -> None:
    write(tmp_path, f"file,label\n1.jpg,{word}\n2.jpg,dog\n".encode(encoding))
    with pytest.raises(SourceError, match="does not say its encoding, such as 1") as caught:
        run_source(tmp_path, kind="table", path="labels.csv")
    assert f"1.jpg,{word} in {encoding}" in str(caught.value)
    assert f"`visionloop ingest {shlex.quote(str(tmp_path / 'labels.csv'))} --encoding {encoding}`" in str(caught.value)
    found = run_source(tmp_path, kind="table", path="labels.csv", encoding=encoding)
    assert found.items[0].labels == (word,)


def test_two_encodings_in_one_table_and_none_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "file,label\n1.jpg,café\n".encode() + "2.jpg,naïve\n".encode("cp1252"))
    with pytest.raises(SourceError, match="line 3: is not UTF-8, the lines before are"):
        run_source(tmp_path, kind="table", path="labels.csv")
    write(tmp_path, b"file,label\n" + b"1.jpg," + b"\xaa\xb0\xdb\x81\x98\xbf\xa5" * 8 + b"\n")
    with pytest.raises(SourceError, match="line 2: is not UTF-8, and reads well in no encoding"):
        run_source(tmp_path, kind="table", path="labels.csv")


def test_the_encoding_of_a_zip_is_that_of_its_table_too(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("labels.csv", "file,label\n1.jpg,kočka\n2.jpg,dog\n".encode("cp1250"))
        archive.writestr("1.jpg", b"1")
        archive.writestr("2.jpg", b"2")
    with pytest.raises(SourceError, match=r"kočka in cp1250.*a\.zip --encoding cp1250`"):
        run_source(tmp_path, kind="archive", path="a.zip")
    found = run_source(tmp_path, kind="archive", path="a.zip", encoding="cp1250")
    assert [item.labels for item in found.items] == [("kočka",), ("dog",)]
