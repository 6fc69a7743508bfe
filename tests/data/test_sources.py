"""Arguments and the config's dataset section; Ludwig's and the hub's datasets from a stand-in of the hub."""

import hashlib
import json
import logging
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest

from ludwig_peft_plugin.data.sources import (
    DataSources,
    choose_sources,
    combine,
    describe_experiment,
    load_frames,
)
from ludwig_peft_plugin.errors import DataError

FRAME = pd.DataFrame({"a": ["x", "y"]})


@dataclass
class Hub:
    """A stand-in for the Hugging Face hub on this machine; `repository` is the only one it has.

    Attributes:
        files: what the repository holds, by name.
        requests: the paths that were asked for.
    """

    repository: str
    files: dict[str, bytes]
    url: str = ""
    requests: list[str] = field(default_factory=list)


def handler(hub):
    revision = "1" * 40
    base = f"/datasets/{hub.repository}/resolve/"

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            """Say nothing."""

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.split("?")[0]
            hub.requests.append(path)
            name = path.removeprefix(base).partition("/")[2]
            if path.startswith(f"/api/datasets/{hub.repository}/tree/"):
                self.answer(200, json.dumps([self.entry(each) for each in hub.files]).encode())
            elif path.startswith(f"/api/datasets/{hub.repository}"):
                siblings = [{"rfilename": each} for each in hub.files]
                facts = {"id": hub.repository, "sha": revision, "private": False, "gated": False, "siblings": siblings}
                self.answer(200, json.dumps(facts).encode())
            elif path.startswith(base) and name in hub.files:
                tag = f'"{self.entry(name)["oid"]}"'
                self.answer(200, hub.files[name], **{"ETag": tag, "X-Repo-Commit": revision})
            elif path.startswith(base):
                self.answer(404, b"", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": revision})
            else:
                self.answer(404, b"", **{"X-Error-Code": "RepoNotFound"})

        def entry(self, name):
            content = hub.files[name]
            return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

        def answer(self, status, content, **headers):
            self.send_response(status)
            for header, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    return Handler


@pytest.fixture
def hub(registered, monkeypatch, tmp_path):
    """A hub with flytech/python-codes-25k's files (five rows in each), which the hub's own clients talk to."""
    import huggingface_hub

    import datasets

    rows = [
        {
            "output": f"```python\nprint({row})\n```",
            "instruction": f"Print {row}!",
            "input": f"00{row}",
            "text": f"Print {row}! 00{row}",
        }
        for row in range(5)
    ]
    stand_in = Hub(
        "flytech/python-codes-25k",
        {
            "README.md": b"---\nlanguage: en\n---\n",
            "python-codes-25k.json": json.dumps(rows).encode(),
            "python-codes-25k.jsonl": "\n".join(map(json.dumps, rows)).encode(),
        },
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(stand_in))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    # The libraries read these from the environment once, when they are imported.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", stand_in.url)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        stand_in.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", stand_in.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("LUDWIG_CACHE", str(tmp_path / "ludwig"))
    yield stand_in
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_configs_section_is_used_without_arguments():
    assert choose_sources({"dataset": "a.csv", "data_format": "tsv"}) == DataSources("a.csv", data_format="tsv")
    section = {"dataset": None, "training_set": "a.csv", "test_set": "b.csv", "data_format": None}
    assert choose_sources(section, data_format="auto") == DataSources(training_set="a.csv", test_set="b.csv")
    assert choose_sources({"dataset": "a.csv", "data_format": "tsv"}, data_format="csv").data_format == "csv"


def test_an_argument_replaces_the_whole_section(caplog):
    config = {"training_set": "a.csv", "validation_set": "b.csv", "data_format": "tsv"}
    with caplog.at_level(logging.INFO, logger="ludwig_peft_plugin"):
        chosen = choose_sources(config, dataset=FRAME)
    assert chosen.dataset is FRAME
    assert (chosen.training_set, chosen.validation_set, chosen.data_format) == (None, None, None)
    assert "training_set and validation_set is not used" in caplog.text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "There are no data to use"),
        ({"dataset": "a", "test_set": "b"}, "dataset is split by preprocessing.split, so test_set would be ignored"),
        ({"validation_set": "a", "test_set": "b"}, "validation_set and test_set without training_set"),
        ({"dataset": "a.pkl", "data_format": "pickle"}, "unpickling runs code"),
    ],
)
def test_refused(given, said):
    with pytest.raises(DataError, match=said):
        choose_sources(given)


def test_pickle_in_a_config_is_not_opened_but_an_argument_is(tmp_path):
    path = tmp_path / "data.pkl"
    FRAME.to_pickle(path)
    with pytest.raises(DataError, match=r"data_format: one of"):
        load_frames(choose_sources({"dataset": str(path)}))
    assert load_frames(choose_sources({}, dataset=str(path), data_format="pickle"))["dataset"].equals(FRAME)


def test_separate_sets_are_marked_in_a_split_column():
    frames = load_frames(DataSources(training_set=FRAME, validation_set={"a": ["v"]}, test_set=FRAME[:1]))
    combined = combine(frames)
    assert combined["a"].tolist() == ["x", "y", "v", "x"]
    assert combined["split"].tolist() == [0, 0, 1, 2]


def test_python_codes_25k(hub, tmp_path):
    frame = load_frames(DataSources("ludwig://python_codes_25k"))["dataset"]
    assert list(frame) == ["instruction", "input", "output"]
    assert frame["instruction"].tolist() == [f"Print {row}!" for row in range(5)]
    assert frame["input"].tolist() == [f"00{row}" for row in range(5)]
    assert hub.requests
    hub.requests.clear()
    again = load_frames(DataSources("ludwig://python_codes_25k"))["dataset"]
    assert again.equals(frame)
    assert hub.requests == [], "the second time it comes from Ludwig's cache"


def test_python_codes_25k_from_json_lines(hub):
    del hub.files["python-codes-25k.json"]
    assert len(load_frames(DataSources("ludwig://python_codes_25k"))["dataset"]) == 5
    hub.files.clear()


def test_python_codes_25k_through_ludwigs_own_functions(hub, tmp_path):
    import ludwig.datasets

    assert "python_codes_25k" in ludwig.datasets.list_datasets()
    assert "flytech/python-codes-25k" in ludwig.datasets.describe_dataset("python_codes_25k")
    assert len(ludwig.datasets.get_dataset("python_codes_25k").load()) == 5
    ludwig.datasets.download_dataset("python_codes_25k", str(tmp_path / "here"))
    assert len(pd.read_parquet(tmp_path / "here" / "python_codes_25k.parquet")) == 5


def test_the_hubs_copy_is_cut_to_one(hub, caplog):
    frame = load_frames(DataSources("hf://flytech/python-codes-25k"))["dataset"]
    assert frame["instruction"].tolist() == [f"Print {row}!" for row in range(5)]
    assert "holds the same 5 rows twice" in caplog.text


def test_hub_data_that_are_not_doubled_stay_whole(hub, caplog):
    rows = [json.loads(line) for line in hub.files["python-codes-25k.jsonl"].splitlines()]
    rows[2]["text"] = "changed"
    hub.files["python-codes-25k.jsonl"] = "\n".join(map(json.dumps, rows)).encode()
    assert len(load_frames(DataSources("hf://flytech/python-codes-25k"))["dataset"]) == 10
    assert "twice" not in caplog.text


def test_a_set_the_hub_has_not(hub, caplog):
    uri = "hf://flytech/python-codes-25k"
    frames = load_frames(DataSources(training_set=uri, validation_set=uri))
    assert list(frames) == ["training_set"]
    assert "there is no validation_set" in caplog.text


def test_offline_says_what_works(hub, monkeypatch):
    import huggingface_hub

    import datasets

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for uri in ("ludwig://python_codes_25k", "hf://flytech/python-codes-25k"):
        with pytest.raises(DataError) as error:
            load_frames(DataSources(uri))
        message = str(error.value)
        assert uri in message
        assert "path" in message
        assert message.count("\n") <= 3
    assert hub.requests == []


def test_unreachable_hub(hub, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's attempts
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
    )
    with pytest.raises(DataError, match=r"cannot be downloaded from http://127.0.0.1:9"):
        load_frames(DataSources("ludwig://python_codes_25k"))


def test_unknown_names(hub):
    with pytest.raises(DataError, match=r"no dataset 'python_code_25k'. Did you mean ludwig://python_codes_25k"):
        load_frames(DataSources("ludwig://python_code_25k"))
    with pytest.raises(DataError, match="hf://flytech/nothing cannot be loaded"):
        load_frames(DataSources("hf://flytech/nothing"))


def test_description_of_an_experiment(tmp_path):
    def original(config, **kwargs):
        return {name: value for name, value in kwargs.items() if value is not None}

    config = {"model_type": "llm", "dataset": "a.jsonl"}
    described = describe_experiment(original, config, dataset=None, data_format="auto", random_seed=1)
    assert described == {"dataset": "a.jsonl", "data_format": "jsonl", "random_seed": 1}
    assert describe_experiment(original, config, training_set=tmp_path / "b.csv", test_set=FRAME) == {
        "training_set": str(tmp_path / "b.csv"),
        "test_set": FRAME,
        "data_format": "csv",
    }
    assert describe_experiment(original, config, dataset=FRAME)["data_format"] == "DataFrame"
    assert describe_experiment(original, {"model_type": "llm", "dataset": "hf://x/y"})["data_format"] == "hf"
    assert describe_experiment(original, {"model_type": "ecd"}, dataset=None) == {}
    with pytest.raises(DataError, match="does not say the format"):
        describe_experiment(original, config, dataset="a.what")
