// The page: renders the store. All state is in the store; everything here can run again.

import { el, fill, fillRows, setText } from "./dom.js";
import { follow } from "./feed.js";
import { bytes, count, milliseconds, moment, quoted, reachable } from "./format.js";
import { topology } from "./topology.js";

const ID_CHARS = 8; // of an id: enough to tell the members of a mesh apart
const FAR_AWAY_MS = 10 * 365 * 86_400_000; // a founder's membership ends after a lifetime

const $ = (id) => document.getElementById(id);
const pill = (state, text = state) => el("span", { class: `state pill ${state}` }, text);
const sub = (text) => el("span", { class: "sub" }, text);

const NODE_COLUMNS = [
  {
    value: (node) => [node.name, node.self ? "this node" : node.address],
    build: ([name, about]) => [name, sub(about)],
  },
  { label: "State", value: (node) => node.state, build: (state) => [pill(state)] },
  {
    label: "Role",
    value: (node) => [node.role || "–", cameIn(node), ends(node.expires_at)],
    build: ([role, ...about]) => [role, ...about.filter(Boolean).map(sub)],
  },
  { label: "Memory", number: true, value: (node) => bytes(node.memory_bytes), build: (text) => [text] },
  { label: "Engine", value: (node) => node.engine || "none", build: (text) => [text] },
  {
    label: "Models",
    value: (node) => node.models.map((model) => [model.state, model.id + layers(model)]),
    build: (models) => [models.length ? chips(models) : "–"],
  },
  {
    label: "Round trip", number: true,
    value: (node) => milliseconds(node.rtt_ms), build: (text) => [text],
  },
];

const INVITATION_COLUMNS = [
  { value: (one) => one.id.slice(0, ID_CHARS), build: (id) => [el("code", {}, id)] },
  {
    label: "Role",
    value: (one) => [one.role, one.stage],
    build: ([role, stage]) => (stage ? [role, sub("and the right stage")] : [role]),
  },
  { label: "Used", value: used, build: (text) => [text] },
  { label: "Until", value: (one) => moment(one.until), build: (text) => [text] },
  { label: "Made by", value: (one) => one.by, build: (text) => [text] },
];

const MODEL_COLUMNS = [
  {
    value: (model) => [model.id, model.name],
    build: ([id, name]) => (name && name !== id ? [id, sub(name)] : [id]),
  },
  { label: "State", value: (model) => model.state, build: (state) => [pill(state)] },
  {
    label: "Replicas",
    value: (model) => model.replicas.map((one) => [one.state, one.name + layers(one), one.detail]),
    build: (replicas) => [replicas.length ? chips(replicas) : "–"],
  },
  { label: "Size", number: true, value: (model) => bytes(model.size_bytes), build: (text) => [text] },
  {
    label: "Architecture",
    value: (model) => [model.architecture, model.gives.join(", ")],
    build: ([architecture, gives]) => [architecture, sub(gives)],
  },
  { label: "Why", value: (model) => model.reason || "–", build: (text) => [text] },
];

function cameIn({ basis, by, stage }) {
  const how = { founder: "founded the mesh", invite: `invited by ${by}`, lan: `let in on the network of ${by}`, grant: `granted by ${by}`, recovery: "by the recovery code" };
  return [how[basis], stage && by ? "right stage" : ""].filter(Boolean).join(", ");
}

function ends(at) {
  return at && at * 1000 - Date.now() < FAR_AWAY_MS ? `until ${moment(at)}` : "";
}

function used({ used, uses }) {
  if (!uses) return "any number of times";
  return used === null ? `at most ${uses}` : `${used} of ${uses}`; // only its maker counts
}

function layers({ layers: range, experts }) {
  if (experts) {
    const what = experts.kind === "experts" ? "experts" : "of each expert";
    return ` · ${experts.held}/${experts.of} ${what}`;
  }
  if (!range) return "";
  const [first, last] = range;
  return first === last ? ` · layer ${first}` : ` · layers ${first}–${last}`;
}

function chips(items) {
  const list = items.map(([state, text, detail]) => {
    const chip = pill(state, text);
    chip.append(el("span", { class: "unseen" }, ` ${state}`));
    chip.title = detail ? `${state}: ${detail}` : state;
    return chip;
  });
  return el("span", { class: "chips" }, ...list);
}

function render({ snapshot, state }) {
  document.body.dataset.state = state;
  $("lost").hidden = state !== "lost";
  setText($("lost"), state === "lost" ? "Connection to this node lost, trying again" : "");
  if (snapshot === null) return;
  document.querySelector("main").hidden = false;
  const { node, mesh, nodes, models } = snapshot;
  renderHead(mesh, nodes, models);
  renderUse(node, models);
  renderWarnings([...node.warnings, ...mesh.notices, ...mesh.others.map(another)]);
  renderJoin(snapshot);
  renderTopology(nodes);
  fillRows($("nodes"), nodes, (one) => one.id, NODE_COLUMNS);
  fillRows($("models"), models, (one) => one.digest, MODEL_COLUMNS);
  $("alone").hidden = nodes.length !== 1;
  $("no-models").hidden = models.length > 0;
  $("models").parentElement.hidden = models.length === 0;
  setText($("footer"), `p2pmesh ${node.version} · node ${node.id} · mesh ${mesh.id} · plan ${mesh.plan.slice(0, 8)}`);
}

function renderTopology(nodes) {
  const box = $("topology");
  fill(box, [nodes, box.clientWidth], () => [topology(nodes, box.clientWidth)]);
}

function renderHead(mesh, nodes, models) {
  document.title = `${mesh.name} · p2pmesh`;
  setText($("mesh"), mesh.name);
  const live = nodes.filter((one) => one.state === "live").length;
  const ready = models.filter((one) => one.state === "ready").length;
  const parts = [
    live === nodes.length ? count(live, "node") : `${live} of ${count(nodes.length, "node")} live`,
    models.length ? `${ready} of ${count(models.length, "model")} ready` : "no models yet",
    mesh.agreed ? "all nodes agree on the plan" : "nodes are agreeing on a plan",
  ];
  setText($("summary"), [kind(mesh), ...parts].join(" · "));
}

function kind(mesh) {
  if (mesh.open === null) return "used through its members"; // this node is a guest
  return mesh.open ? "open" : "private";
}

function another(name) {
  return `Another open mesh ${JSON.stringify(name)} is here: p2pmesh up --mesh ${quoted(name)}`;
}

function renderJoin({ mesh, nodes, newcomers, invitations }) {
  setText($("who"), whoMayJoin(mesh));
  const inviting = nodes.filter((one) => ["invite", "admin"].includes(one.role));
  const here = inviting.some((one) => one.self);
  const where = inviting.length ? `on ${inviting[0].name}` : "on a node of an admin";
  setText($("inviter"), here ? "here, then on the other machine p2pmesh join TOKEN" : `${where}, then on the other machine p2pmesh join TOKEN`);
  $("newcomers").hidden = newcomers.length === 0;
  fill($("newcomers"), newcomers, () => newcomers.map((one) =>
    el("li", {}, `${one.name} at ${one.host} waits to join. To let it in: `, el("code", {}, `p2pmesh admit ${one.id.slice(0, ID_CHARS)}`))));
  fillRows($("invitations"), invitations, (one) => one.id, INVITATION_COLUMNS);
  $("invitations").parentElement.hidden = invitations.length === 0;
}

function whoMayJoin(mesh) {
  const reads = "The node that answers can read the prompt.";
  if (mesh.admits) return `This mesh is open: anyone on this network can join. ${reads}`;
  const where = mesh.open ? "This mesh is open, but not on this network" : "This mesh is private";
  if (mesh.open === null) return `This node only uses this mesh; its members decide who can join. ${reads}`;
  return `${where}: whoever is invited can join. ${reads}`;
}

function renderUse(node, models) {
  const address = reachable(node.api, location.hostname);
  const served = models.find((one) => one.state === "ready" && one.gives.includes("chat"));
  setText($("api"), `http://${address}/v1`);
  setText($("curl"), curl(address, served ? served.id : "auto"));
  const { engine, memory } = node;
  const facts = [
    ["Name", node.name],
    ["Memory", `${bytes(memory.used_bytes)} of ${bytes(memory.budget_bytes)} for models in use`],
    ["Engine", engine ? `${engine.kind} ${engine.version} (${engine.source})` : "none"],
    ...(engine?.devices ?? []).map((device) => [device.id, device.description]),
  ];
  fill($("facts"), facts, () => facts.flatMap(([term, text]) => [el("dt", {}, term), el("dd", {}, text)]));
}

function curl(address, model) {
  const body = `{"model": ${JSON.stringify(model)},
       "messages": [{"role": "user", "content":
         "What is the capital of France?"}]}`;
  return [
    `curl http://${address}/v1/chat/completions \\`,
    "  -H 'Content-Type: application/json' \\",
    `  -d ${quoted(body)}`,
  ].join("\n");
}

function renderWarnings(warnings) {
  $("warnings").hidden = warnings.length === 0;
  fill($("warnings"), warnings, () => warnings.map((text) => el("li", {}, text)));
}

async function copy(button) {
  const source = $(button.dataset.copy);
  const done = await toClipboard(source);
  setText(button, done ? "Copied" : "Press Ctrl+C");
  setText($("said"), done ? "Copied" : "Selected, press Ctrl+C to copy");
  setTimeout(() => { setText(button, "Copy"); setText($("said"), ""); }, 2000);
}

async function toClipboard(source) {
  try {
    await navigator.clipboard.writeText(source.textContent);
    return true;
  } catch { // no permission, or not a secure context: select it, so that the keyboard can
    getSelection().selectAllChildren(source);
    return document.execCommand("copy");
  }
}

let latest = { snapshot: null };
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", () => copy(button));
}
new ResizeObserver(() => latest.snapshot && renderTopology(latest.snapshot.nodes)).observe($("topology"));
follow("/api/events", (store) => { latest = store; render(store); });
