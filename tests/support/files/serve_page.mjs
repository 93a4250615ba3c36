// A stand-in for a browser, in which the page of a served model is used; prints what a person would see.
import fs from "node:fs";

const [page, answers] = JSON.parse(fs.readFileSync(0, "utf8"));
const elements = {};
globalThis.document = {getElementById: id => elements[id] ??= {value: "", hidden: false, textContent: "", className: ""}};
const of = globalThis.document.getElementById;
const sent = [];
globalThis.fetch = async (path, options) => {
  sent.push([path, options.headers.Authorization ?? null, options.body ? JSON.parse(options.body) : null]);
  const answer = answers[path];
  if (typeof answer === "string") return new Response(answer);
  return new Response(JSON.stringify(answer), {status: answer.error ? 422 : 200});
};
(0, eval)(page.match(/<script>([^]*)<\/script>/)[1]);
of("token").value = "secret";
await of("token").onchange();
of("text").value = "abc";
of("options").value = '{"seed": 1}';
await of("go").onclick();
const predicted = of("answer").textContent;
const saved = of("save").hidden ? null : of("save").href;
await of("stream").onclick();
console.log(JSON.stringify({sent, name: of("name").textContent, predicted, saved, streamed: of("answer").textContent, bad: of("answer").className}));
