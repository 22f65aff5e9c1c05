"""`visionloop store init` on a bucket and a folder, the whole way from photos to prepared data, and DVC beside it."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes import write_photos
from fault_proxy import CODES, FaultProxy, serve_faults
from s3_server import S3_ENV, make_bucket, make_client, point_to
from shapes import run
from visionloop.data.manifest import latest_version, list_versions
from visionloop.data.parts import load_version_records
from visionloop.data.prepare import prepare
from visionloop.errors import StoreError
from visionloop.ingest.pull import pull
from visionloop.params import FolderSource, make_params
from visionloop.settings import load_settings
from visionloop.store import LocalStore, S3Store, open_store
from visionloop.store.setup import describe_store, init_store, list_dvc_commands
from visionloop.workspace import connect


@pytest.fixture
def proxy(endpoint_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with serve_faults(endpoint_url) as proxy:
        point_to(monkeypatch, proxy.url, AWS_MAX_ATTEMPTS="1")
        yield proxy


def tell(facts: Any) -> dict[str, tuple[str, bool]]:
    return {fact.subject: (fact.found, fact.ok) for fact in facts}


READY = {
    "versioning": ("on", True),
    "unfinished uploads": ("removed after 7 days", True),
    "encryption": ("AES256 by default", True),
    "public access": ("blocked", True),
}


def test_init_makes_a_bucket_ready_and_can_be_run_again(proxy: FaultProxy, client: Any) -> None:
    store = open_store("s3://fresh/team")
    with pytest.raises(StoreError, match=r"there is no bucket fresh; .* Run `visionloop store init`"):
        list(describe_store(store))
    assert tell(init_store(store)) == {
        "bucket": ("fresh made in us-east-1", True),
        **READY,
        "conditional writes": ("yes", True),
    }
    assert tell(init_store(store))["bucket"] == ("fresh is there", True)
    facts = tell(describe_store(store))
    assert facts == {"store": (f"s3://fresh/team at {proxy.url}", True), "reachable": ("yes", True), **READY}
    assert "Versions" not in client.list_object_versions(Bucket="fresh"), "the probe is gone without a trace"


def test_init_keeps_what_others_have_set(proxy: FaultProxy, client: Any, endpoint_url: str) -> None:
    make_bucket(endpoint_url, "shared")
    theirs = {"ID": "theirs", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 3}}
    client.put_bucket_lifecycle_configuration(Bucket="shared", LifecycleConfiguration={"Rules": [theirs]})
    before = tell(describe_store(open_store("s3://shared/team")))
    assert before["versioning"] == ("off", False)
    assert before["unfinished uploads"] == ("kept for ever", False)
    list(init_store(open_store("s3://shared/team")))
    rules = client.get_bucket_lifecycle_configuration(Bucket="shared")["Rules"]
    assert [(r["ID"], r["Filter"]["Prefix"]) for r in rules] == [
        ("theirs", "logs/"),
        ("visionloop-unfinished-uploads", "team/"),
    ]


def test_a_store_that_lacks_something_says_so_and_goes_on(proxy: FaultProxy) -> None:
    proxy.refusals = {"?encryption": 501, "?publicAccessBlock": 403}
    facts = tell(init_store(open_store("s3://lacking")))
    assert facts["encryption"] == ("cannot be read or set here (NotImplemented)", False)
    assert facts["public access"] == ("cannot be read or set here (AccessDenied)", False)
    assert facts["versioning"] == ("on", True)
    assert facts["conditional writes"] == ("yes", True)


def test_a_store_without_conditional_writes_is_refused(proxy: FaultProxy) -> None:
    proxy.ignored = {"if-none-match"}
    with pytest.raises(StoreError, match=r"overwrites an object although `If-None-Match: \*` forbids it"):
        list(init_store(open_store("s3://careless")))


CANNOT = "cannot be on here: every write is refused then ({}); it was taken back"
NO_RULES = b'<ServerSideEncryptionConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/"/>'
NO_MESSAGE = b"<Error><Code>InvalidArgument</Code><Message/></Error>"


@pytest.mark.parametrize(
    ("query", "subject", "status"),
    [
        ("?encryption", "encryption", 500),  # SeaweedFS without a key
        ("?encryption", "encryption", 400),  # Ceph 20.2 without a key service
        ("?publicAccessBlock", "public access", 403),  # Ceph 16.2
        ("?lifecycle", "unfinished uploads", 403),
    ],
)
def test_a_setting_that_ends_all_writes_is_taken_back(proxy: FaultProxy, query: str, subject: str, status: int) -> None:
    proxy.breaks = {query: status}
    store = open_store(f"s3://{subject.replace(' ', '-')}-{status}")
    facts = tell(init_store(store))
    assert facts[subject] == (CANNOT.format(CODES[status]), False)
    others = {name: fact for name, fact in READY.items() if name != subject}
    assert {name: facts[name] for name in others} == others
    store.put("a/1", b"x")
    assert tell(describe_store(store))[subject][1] is False


def test_what_is_taken_back_is_as_it_was_before(proxy: FaultProxy, client: Any, endpoint_url: str) -> None:
    make_bucket(endpoint_url, "as-before")
    partly = {"BlockPublicAcls": False, "IgnorePublicAcls": False, "BlockPublicPolicy": True}
    before = {**partly, "RestrictPublicBuckets": False}
    client.put_public_access_block(Bucket="as-before", PublicAccessBlockConfiguration=before)
    theirs = {"ID": "theirs", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 3}}
    client.put_bucket_lifecycle_configuration(Bucket="as-before", LifecycleConfiguration={"Rules": [theirs]})
    proxy.breaks = {"?publicAccessBlock": 403, "?lifecycle": 403}
    taking_back: list[str] = []
    note = proxy.note_setting

    def mend_at_the_second(method: str, path: str) -> None:
        """Let a setting be taken back by another PUT, not by DELETE."""
        note(method, path)
        if method == "PUT" and "?" in path:
            taking_back.append(path)
            if taking_back.count(path) == 2:
                proxy.broken.clear()

    proxy.note_setting = mend_at_the_second  # type: ignore[method-assign]
    facts = tell(init_store(open_store("s3://as-before")))
    assert facts["public access"] == (CANNOT.format("AccessDenied"), False)
    assert facts["unfinished uploads"] == (CANNOT.format("AccessDenied"), False)
    assert client.get_public_access_block(Bucket="as-before")["PublicAccessBlockConfiguration"] == before
    rules = client.get_bucket_lifecycle_configuration(Bucket="as-before")["Rules"]
    assert [rule["ID"] for rule in rules] == ["theirs"]


def test_a_bucket_that_cannot_be_written_is_an_error_and_stays_as_it_is(proxy: FaultProxy, client: Any) -> None:
    proxy.refusals = {"PUT /unwritable/doctor/": 403}
    with pytest.raises(StoreError, match=r"access denied to put_object doctor/\w+; .* infra/s3.md"):
        list(init_store(open_store("s3://unwritable")))
    assert not any("PUT" in method and "?" in path for method, path, _ in proxy.seen), "nothing was set"


def test_ceph_16_has_no_encryption_rules_and_errors_without_a_message(proxy: FaultProxy) -> None:
    proxy.refusals = {"GET /ceph?encryption": (200, NO_RULES), "PUT /ceph?encryption": (400, NO_MESSAGE)}
    store = open_store("s3://ceph")
    facts = tell(init_store(store))
    assert facts["encryption"] == ("cannot be read or set here (InvalidArgument)", False)
    assert facts["public access"] == ("blocked", True), "it goes on"
    assert tell(describe_store(store))["encryption"] == ("none by default", False)


def test_conditional_writes_that_end_with_versions_are_refused(proxy: FaultProxy, client: Any) -> None:
    proxy.breaks = {"?versioning": "if-none-match"}
    told = r"overwrites an object although .* forbids it \(its versioning is on\); .* or a newer release of it"
    with pytest.raises(StoreError, match=told):
        list(init_store(open_store("s3://ceph-16")))
    assert client.get_bucket_versioning(Bucket="ceph-16")["Status"] == "Suspended", "it was taken back"
    client.put_bucket_versioning(Bucket="ceph-16", VersioningConfiguration={"Status": "Enabled"})
    proxy.broken = {"?versioning"}
    with pytest.raises(StoreError, match=told):
        list(init_store(open_store("s3://ceph-16")))


def test_a_store_without_conditions_and_versions_is_refused_for_the_conditions(proxy: FaultProxy) -> None:
    """As `rclone serve s3`: 501 to all that concerns versions; so the probe is removed by a plain delete."""
    proxy.ignored = {"if-none-match"}
    proxy.refusals = {"?versions": 501, "?versioning": 501}
    store = open_store("s3://like-rclone")
    with pytest.raises(StoreError, match=r"although `If-None-Match: \*` forbids it \(it has no versioning\); expected"):
        list(init_store(store))
    assert list(store.list("")) == []


def test_a_store_goes_on_without_versions(proxy: FaultProxy) -> None:
    proxy.refusals = {"?versions": 501, "?versioning": 501}
    facts = tell(init_store(open_store("s3://no-versions")))
    assert facts["versioning"] == ("cannot be read or set here (NotImplemented)", False)
    assert facts["conditional writes"] == ("yes", True)


def test_seaweed_without_a_key_is_made_ready_and_stays_writable(
    seaweed_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(monkeypatch, seaweed_url)
    store = open_store("s3://setup/team")
    facts = tell(init_store(store))
    assert facts == {
        "bucket": ("setup made in us-east-1", True),
        **READY,
        "encryption": (CANNOT.format("InternalError"), False),
        "public access": ("cannot be read or set here (NotImplemented)", False),
        "conditional writes": ("yes", True),
    }
    assert tell(init_store(store)) == {**facts, "bucket": ("setup is there", True)}
    store.put("a/1", b"x")
    assert tell(describe_store(store))["encryption"] == ("none by default", False)
    left = make_client(seaweed_url).list_object_versions(Bucket="setup")
    assert [version["Key"] for version in left["Versions"]] == ["team/a/1"], "the probes are gone without a trace"


def test_seaweed_refuses_a_wrong_secret(seaweed_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to(monkeypatch, seaweed_url, AWS_SECRET_ACCESS_KEY="wrong")
    with pytest.raises(StoreError, match=r"access denied|the secret key does not fit"):
        list(init_store(open_store("s3://setup-wrong")))


def test_a_store_that_goes_away_half_way_is_an_error(proxy: FaultProxy) -> None:
    proxy.refusals = {"?lifecycle": 503}
    with pytest.raises(StoreError, match="is busy: it answers SlowDown to get_bucket_lifecycle_configuration"):
        list(init_store(open_store("s3://shaky")))


def test_a_local_store_is_a_folder(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "a" / "store")
    assert tell(describe_store(store))["store"][0].endswith("(a folder that is made when it is needed)")
    assert not store.root.exists(), "asking makes nothing"
    assert tell(init_store(store)) == {"folder": (f"{store.root} made", True)}
    assert tell(init_store(store)) == {"folder": (f"{store.root} is there", True)}
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be made"):
        list(init_store(LocalStore(tmp_path / "file" / "store")))


def fill(folder: Path) -> Path:
    write_photos(folder, 15)
    (folder / "cat" / "broken.png").write_bytes(b"no image")
    return folder


def test_from_photos_to_prepared_data_in_a_bucket_as_in_a_folder(proxy: FaultProxy, tmp_path: Path) -> None:
    photos = fill(tmp_path / "photos")
    params = make_params({"name": "pets", "prepare": {"image_size": 32}})
    source = FolderSource(kind="folder", path=str(photos), name="photos")
    stores = {"folder": LocalStore(tmp_path / "store"), "bucket": S3Store("s3://whole/team")}
    list(init_store(stores["bucket"]))
    versions, shards = {}, {}
    for kind, store in stores.items():
        home = tmp_path / kind
        home.mkdir()
        (home / "params.yaml").write_text("name: pets\n")
        settings = load_settings({"VISIONLOOP_STORE": store.url}, home)
        opened = open_store(settings.store_url)
        report = pull(connect(settings, params, store=opened), sources=[source], now="2026-01-01T00:00:00+00:00")
        assert (report.num_added, [r.code for r in report.rejected]) == (30, ["not_an_image"])
        prepare(connect(settings, params, store=opened))
        versions[kind] = report.version.digest
        shards[kind] = {p.name: p.read_bytes() for p in settings.prepared_dir.glob("*.npy")}
        again = pull(connect(settings, params, store=opened), sources=[source], now="2026-01-02T00:00:00+00:00")
        assert not again.changed
    assert versions["folder"] == versions["bucket"]
    assert shards["folder"] == shards["bucket"] != {}
    assert len(list_versions(stores["bucket"], "pets")) == 1


def test_a_pull_that_breaks_off_goes_on_and_ends_with_the_same_version(
    proxy: FaultProxy, tmp_path: Path, endpoint_url: str
) -> None:
    make_bucket(endpoint_url, "broken-off")
    store, params = S3Store("s3://broken-off"), make_params({"name": "pets"})
    (tmp_path / "params.yaml").write_text("name: pets\n")
    settings = load_settings({}, tmp_path)
    source = FolderSource(kind="folder", path=str(fill(tmp_path / "photos")), name="photos")
    proxy.plan(*["pass"] * 12, *[503] * 8)
    with pytest.raises(StoreError, match="is busy: it answers SlowDown to put_object images/") as caught:
        pull(connect(settings, params, store=store), sources=[source], now="2026-01-01T00:00:00+00:00")
    assert caught.value.transient
    proxy.plan()
    assert latest_version(store, "pets") is None, "no half of a version"
    report = pull(connect(settings, params, store=store), sources=[source], now="2026-01-01T00:00:00+00:00")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "params.yaml").write_text("name: pets\n")
    whole = connect(load_settings({}, tmp_path / "elsewhere"), params, store=LocalStore(tmp_path / "store"))
    expected = pull(whole, sources=[source], now="2026-01-01T00:00:00+00:00")
    assert report.version.digest == expected.version.digest
    assert len(load_version_records(store, report.version)) == 30


def test_dvc_keeps_its_cache_in_the_same_bucket(proxy: FaultProxy, client: Any, tmp_path: Path) -> None:
    """The commands that `store init` prints, then push, an empty cache, and pull."""
    store = open_store("s3://with-dvc/team")
    list(init_store(store))
    commands = list_dvc_commands(store)
    assert commands == [
        "dvc remote add --default store s3://with-dvc/team/dvc",
        f"dvc remote modify store endpointurl {proxy.url}",
    ]
    env = {**S3_ENV, "DVC_SITE_CACHE_DIR": str(tmp_path / "site")}
    home = tmp_path / "ws"
    (home / ".dvc").mkdir(parents=True)
    (home / ".dvc" / "config").write_text("[core]\nno_scm = true\n")
    (home / "index.bin").write_bytes(bytes(range(256)) * 100)
    for command in (*commands, "dvc add -q index.bin", "dvc push -q"):
        done = run(home, *command.split(), **env)
        assert done.returncode == 0, done.stderr
    assert [e["Key"] for e in client.list_objects_v2(Bucket="with-dvc")["Contents"]] == [
        "team/dvc/files/md5/" + re.sub(r"^(..)", r"\1/", find_md5(home / "index.bin.dvc"))
    ]
    (home / "index.bin").unlink()
    shutil.rmtree(home / ".dvc" / "cache")
    done = run(home, "dvc", "pull", "-q", **env)
    assert done.returncode == 0, done.stderr
    assert (home / "index.bin").read_bytes() == bytes(range(256)) * 100
    assert list(store.list("images/")) == [], "DVC's files are no objects of ours"


def find_md5(path: Path) -> str:
    return re.findall(r"md5: ([0-9a-f]{32})", path.read_text())[0]
