"""A small HTTP server of a patched model, with the shape of OpenAI's chat completions (no streaming, greedy).

curl localhost:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}'
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnpatch import AttnPatchError, patch_model, status, testbed

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="testbed", help="a folder or hub id of a chat model; default: the embedded one")
parser.add_argument("--patch", default="pyramidkv", help="a method that takes a budget")
parser.add_argument("--budget", default="0.25")
parser.add_argument("--host", default="127.0.0.1")
parser.add_argument("--port", type=int, default=8000, help="0 = any free one")
args = parser.parse_args()
if args.model == "testbed":
    model, tokenizer = testbed.load()
else:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", device_map="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
patch_model(model, args.patch, budget=args.budget)  # for as long as the server runs
longest = model.config.get_text_config().max_position_embeddings
one_at_a_time = Lock()  # of the model: requests share its memory, and `status` tells of the newest cache


def check(request):
    """(messages, most tokens to generate) of a request. Raises ValueError where it is wrong."""
    if not isinstance(request, dict) or not isinstance(messages := request.get("messages"), list):
        raise ValueError('give one JSON object with messages: [{"role": "user", "content": "..."}]')
    if unknown := sorted(set(request) - {"messages", "max_tokens", "model", "stream"}):
        raise ValueError(f"{unknown[0]!r} is not supported; give messages and max_tokens")
    if not messages or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise ValueError("messages must hold at least one object with a role and a content, both strings")
    most = request.get("max_tokens", 128)
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError("max_tokens must be a whole number of at least 1")
    if request.get("stream"):
        raise ValueError("this server answers in one piece; leave stream out")
    return messages, most


def complete(request):
    """The response to a request. Raises ValueError, TemplateError or AttnPatchError where the request is wrong."""
    messages, most = check(request)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = ids["input_ids"].shape[1]
    if prompt + most > longest:
        raise ValueError(f"{prompt} tokens and max_tokens {most} are more than the {longest} of this model")
    with one_at_a_time:
        out = model.generate(**ids.to(model.device), max_new_tokens=most, do_sample=False)
        report = status(model)
    text, made = tokenizer.decode(out[0, prompt:], skip_special_tokens=True).strip(), out.shape[1] - prompt
    reason = "stop" if made < most else "length"
    return {
        "object": "chat.completion",
        "model": args.model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made},
        "kv": {"bytes": report.bytes_held, "bytes_without_patch": report.bytes_dense},
    }


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        code, body = 404, {"error": {"message": f"there is no {self.path}; POST to /v1/chat/completions"}}
        if self.path == "/v1/chat/completions":
            try:
                size = int(self.headers.get("Content-Length") or 0)
                if not 0 <= size <= 2**24:
                    raise ValueError("a request has at most 16 MiB")
                code, body = 200, complete(json.loads(self.rfile.read(size)))
            except (ValueError, TemplateError, AttnPatchError) as error:
                code, body = 400, {"error": {"message": str(error)}}
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


server = ThreadingHTTPServer((args.host, args.port), Handler)
print(f"{args.patch} at http://{args.host}:{server.server_port}/v1/chat/completions", flush=True)
try:
    server.serve_forever()
except KeyboardInterrupt:
    server.server_close()
