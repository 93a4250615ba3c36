"""The page of a served model, to try it in a browser: one file that loads nothing from anywhere."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Perceiver</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff; }
textarea, input, pre { font: 14px/1.45 ui-monospace, monospace; width: 100%; box-sizing: border-box; }
textarea { min-height: 7rem; }
pre { background: #f3f3f1; padding: .8rem; min-height: 3rem; white-space: pre-wrap; overflow-wrap: anywhere; }
label { display: block; margin: .8rem 0 .2rem; }
button { font: inherit; margin: .8rem .5rem 0 0; padding: .3rem 1rem; }
.error { color: #a11; }
</style>
</head>
<body>
<h1 id="name">Perceiver</h1>
<p id="what">Give the server's token to see what is served here.</p>
<label for="token">Token, if the server wants one</label><input type="password" id="token" autocomplete="off">
<div id="file-part" hidden><label for="file" id="file-label">Image</label><input type="file" id="file"></div>
<div id="second-part" hidden><label for="second">Second frame</label><input type="file" id="second" accept="image/*"></div>
<div id="text-part"><label for="text" id="text-label">Text</label><textarea id="text"></textarea></div>
<div id="options-part" hidden><label for="options">Options (JSON)</label><input id="options" value="{}"></div>
<button id="go">Predict</button><button id="stream" hidden>Stream</button>
<p><a id="save" download="answer.mid" hidden>Save answer.mid</a></p>
<pre id="answer" aria-live="polite"></pre>
<script>
"use strict";
let model = {{interface}};  // null: the server tells it only to those who have the token
let fields = [], kind = "text";
const files = {
  image: ["Image", "image/*"], audio: ["Sound file", "audio/*"], midi: ["MIDI file to continue (none: from nothing)", ".mid,.midi"],
  frames: ["First frame", "image/*"],
};
const of = id => document.getElementById(id);
function setUp() {
  fields = Object.keys(model.row).filter(name => name !== "id");
  kind = model.row[fields[0]];
  of("name").textContent = model.model;
  of("what").textContent = `checkpoint ${model.checkpoint}, mode ${model.mode}`;
  of("file-part").hidden = !(kind in files);
  of("second-part").hidden = kind !== "frames";
  of("text-part").hidden = kind in files;
  if (kind in files) [of("file-label").textContent, of("file").accept] = files[kind];
  of("options-part").hidden = model.options.length === 0;
  of("options").placeholder = model.options.join(", ");
  of("stream").hidden = model.mode !== "generate";
  if (kind === "arrays") {
    of("text-label").textContent = "Row (JSON)";
    of("text").value = JSON.stringify(model.example);
  }
}
if (model) setUp();
of("token").onchange = async () => {
  try {
    const reply = await fetch("model", {headers: {Authorization: `Bearer ${of("token").value}`}});
    const found = await reply.json();
    if (!reply.ok) { show(found.error, true); return; }
    model = found;
    setUp();
    show("");
  } catch (error) { show(String(error), true); }
};
function show(text, bad) {
  of("save").hidden = true;
  of("answer").textContent = text;
  of("answer").className = bad ? "error" : "";
}
function brief(key, value) {  // of what nobody reads number by number its begin
  if (Array.isArray(value) && value.length > 64) return [...value.slice(0, 6), `... ${value.length.toLocaleString("en")} in all`];
  return key === "midi" && value ? `${value.slice(0, 24)}... (a file: base64)` : value;
}
async function row() {
  if (!model) throw "give the token first";
  if (kind === "arrays") return JSON.parse(of("text").value);
  if (!(kind in files)) return {[fields[0]]: of("text").value};
  const found = {[fields[0]]: await base64(of("file").files[0])};
  if (kind === "frames") found[fields[1]] = await base64(of("second").files[0]);
  return found;
}
async function base64(file) {
  if (!file) { if (kind === "midi") return ""; throw "choose a file first"; }
  const bytes = new Uint8Array(await file.arrayBuffer());
  let text = "";
  for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
  return btoa(text);
}
function send(path, body) {
  const headers = {"Content-Type": "application/json"};
  if (of("token").value) headers.Authorization = `Bearer ${of("token").value}`;
  return fetch(path, {method: "POST", headers, body: JSON.stringify(body)});
}
function options() { return model.options.length ? {options: JSON.parse(of("options").value || "{}")} : {}; }
of("go").onclick = async () => {
  show("...");
  try {
    const reply = await send("predict", {rows: [await row()], ...options()});
    const found = await reply.json();
    if (!reply.ok) { show(found.error, true); return; }
    show(JSON.stringify(found.rows[0], brief, 1));
    if (found.rows[0].midi) {
      of("save").href = `data:audio/midi;base64,${found.rows[0].midi}`;
      of("save").hidden = false;
    }
  } catch (error) { show(String(error), true); }
};
of("stream").onclick = async () => {
  show("");
  try {
    const reply = await send("stream", {...await row(), ...options()});
    if (!reply.ok) { show((await reply.json()).error, true); return; }
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", text = "";
    for (;;) {
      const {value, done} = await reader.read();
      if (done) break;
      const events = (rest + value).split("\\n\\n");
      rest = events.pop();
      for (const event of events) {
        const data = JSON.parse(event.slice(6));
        if (data.error) { show(data.error, true); return; }
        if (data.text) show(text += data.text);
      }
    }
  } catch (error) { show(String(error), true); }
};
</script>
</body>
</html>
"""
