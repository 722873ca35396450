"""A run's push to the hub, for which a small server on this machine stands in."""

import base64
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import yaml
from conftest import make_llama, make_rows, make_tokenizer


REPOSITORY = "somebody/support"


@pytest.fixture
def hub():
    """Its address, and the commits that it was sent: of each, the content of the files by their names."""
    commits: list[dict[str, bytes]] = []

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            address = f"http://127.0.0.1:{self.server.server_port}"
            if self.path == "/api/repos/create":
                self.answer({"url": f"{address}/{REPOSITORY}"})
            elif self.path == "/api/validate-yaml":
                self.answer({"warnings": [], "errors": []})
            elif self.path == f"/api/models/{REPOSITORY}/preupload/main":
                files = [
                    {**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
                ]
                self.answer({"files": files})
            elif self.path == f"/api/models/{REPOSITORY}/commit/main":
                lines = [json.loads(line) for line in body.splitlines()]
                files = [line["value"] for line in lines if line["key"] == "file"]
                commits.append({file["path"]: base64.b64decode(file["content"]) for file in files})
                url = f"{address}/{REPOSITORY}/commit/{len(commits):040}"
                self.answer({"success": True, "commitOid": f"{len(commits):040}", "commitUrl": url})
            else:
                self.send_error(404)

        def answer(self, value):
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", commits
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_push_holds_adapter_scores_pictures_and_card(hub, tmp_path):
    address, commits = hub
    make_llama().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    make_rows(16).to_json(tmp_path / "rows.jsonl")
    out = tmp_path / "out"
    recipe = {
        "model_name_or_path": str(tmp_path / "base"), "train_file": str(tmp_path / "rows.jsonl"), "max_steps": 4,
        "save_steps": 2, "hub_strategy": "end", "logging_steps": 1, "score_steps": 1, "use_cpu": True, "bf16": False,
        "report_to": "none", "output_dir": str(out), "push_to_hub": True, "hub_model_id": REPOSITORY,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "beft_trl.cli", "train", str(tmp_path / "recipe.yaml")]
    settings = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_of_nobody", "HF_HOME": str(tmp_path)}
    run = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert (out / "checkpoint-4").is_dir()
    described = {"beft_scores.json", "beft_scores.png", "beft_curve.png", "README.md"}
    tokenizer = {path.name for path in (tmp_path / "base").iterdir() if "token" in path.name}
    adapter = {"adapter_model.safetensors", "adapter_config.json", "training_args.bin"}
    assert set(commits[-1]) == adapter | described | tokenizer
    for name, content in commits[-1].items():
        assert content == (out / name).read_bytes(), name
    card = commits[-1]["README.md"].decode()
    assert "(beft_scores.png)" in card and "(beft_curve.png)" in card and "# support\n" in card
