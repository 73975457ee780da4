
"use strict";

// --- words -----------------------------------------------------------------------------------------------------------

const WORDS = {
  en: {
    newChat: "New chat", settings: "Settings", languageTitle: "中文界面", other: "中文", themeTitle: "Light or dark",
    keyWanted: "This server wants a key.", useKey: "Use it", keyNote: "It stays in this tab's memory and is not stored.",
    keyWrong: "The server does not accept this key.",
    welcome: "Ask something. Enter sends, Shift+Enter begins a line, Esc stops an answer.",
    conversation: "Conversation", system: "System prompt", anySeed: "any", messageHint: "Message", send: "Send",
    stop: "Stop", edit: "Edit", resend: "Send again", cancel: "Cancel", again: "Regenerate", copy: "Copy",
    copied: "Copied", stopped: "stopped", cut: "max_tokens reached", first: "first token", perSecond: "tokens/s",
    tokens: "tokens", contextTitle: "Tokens of the conversation, of those that the model can read",
    unreachable: "The server cannot be reached.", busy: "The server is busy; send again in a moment.",
  },
  zh: {
    newChat: "新对话", settings: "设置", languageTitle: "English interface", other: "English", themeTitle: "浅色或深色",
    keyWanted: "此服务器需要密钥。", useKey: "使用", keyNote: "密钥只保存在本标签页的内存中，不会存储。",
    keyWrong: "服务器不接受此密钥。",
    welcome: "请提问。回车发送，Shift+回车换行，Esc 停止回答。",
    conversation: "对话", system: "系统提示词", anySeed: "随机", messageHint: "消息", send: "发送",
    stop: "停止", edit: "编辑", resend: "重新发送", cancel: "取消", again: "重新生成", copy: "复制",
    copied: "已复制", stopped: "已停止", cut: "达到 max_tokens", first: "首个词元", perSecond: "词元/秒",
    tokens: "词元", contextTitle: "对话所占词元数与模型可读词元数",
    unreachable: "无法连接服务器。", busy: "服务器繁忙，请稍后再发送。",
  },
};
const byId = (id) => document.getElementById(id);
let language = navigator.language.startsWith("zh") ? "zh" : "en";
const word = (name) => WORDS[language][name];

function showWords() {
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  for (const each of document.querySelectorAll("[data-text]")) each.textContent = word(each.dataset.text);
  for (const each of document.querySelectorAll("[data-title]")) each.title = word(each.dataset.title);
  for (const each of document.querySelectorAll("[data-hint]")) each.placeholder = word(each.dataset.hint);
  for (const each of document.querySelectorAll("[data-label]")) each.setAttribute("aria-label", word(each.dataset.label));
  byId("language").textContent = word("other");
}

// --- Markdown: nodes are created one by one and get text only as text ------------------------------------------------

function node(name, content = [], properties = {}) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...(Array.isArray(content) ? content : [content]));
  return made;
}

// Lengths are bounded, so that no text makes this slow.
const INLINE =
  /(`{1,9})([\s\S]{0,999}?[^`])\1(?!`)|\*\*(?=\S)([\s\S]{0,999}?\S)\*\*|\*(?=[^\s*])([^*\n]{0,999}?[^\s*])\*|\[([^\]\n]{1,500})\]\((https?:\/\/[^\s()<>"]{1,999})\)/;

function inline(text, depth = 0) {
  const nodes = [];
  while (text) {
    const found = depth < 4 ? INLINE.exec(text) : null;
    if (!found) break;
    if (found.index) nodes.push(text.slice(0, found.index));
    const [whole, , code, strong, weak, label, address] = found;
    if (code !== undefined) nodes.push(node("code", code));
    else if (strong !== undefined) nodes.push(node("strong", inline(strong, depth + 1)));
    else if (weak !== undefined) nodes.push(node("em", inline(weak, depth + 1)));
    else nodes.push(node("a", label, { href: address, target: "_blank", rel: "noopener noreferrer nofollow" }));
    text = text.slice(found.index + whole.length);
  }
  if (text) nodes.push(text);
  return nodes;
}

const ITEM = /^( *)(?:[-*+]|(\d{1,9})[.)]) +(.*)$/;
const RULE_OF_TABLE = /^ *\|? *:?-+:? *(\| *:?-+:? *)*\|? *$/;
const begins = (line) => /^ *(```|~~~|#{1,6} |> ?|[-*+] |\d{1,9}[.)] )/.test(line);

function blocks(text, depth = 0) {
  const lines = text.split("\n"), nodes = [];
  for (let at = 0; at < lines.length;) {
    const line = lines[at];
    const fence = /^ *(```+|~~~+) *([\w+#.-]*)[^`]*$/.exec(line), head = /^ {0,3}(#{1,6}) +(.*)$/.exec(line);
    if (!line.trim()) at += 1;
    else if (fence) {
      const code = [];
      for (at += 1; at < lines.length && lines[at].trim() !== fence[1]; at += 1) code.push(lines[at]);
      at += 1;
      nodes.push(codeBlock(code.join("\n")));
    } else if (head) {
      nodes.push(node(`h${Math.min(head[1].length + 2, 6)}`, inline(head[2])));
      at += 1;
    } else if (/^ {0,3}([-*_] *){3,}$/.test(line)) {
      nodes.push(node("hr"));
      at += 1;
    } else if (/^ {0,3}>/.test(line) && depth < 4) {
      const inner = [];
      for (; at < lines.length && /^ {0,3}>/.test(lines[at]); at += 1) inner.push(lines[at].replace(/^ {0,3}> ?/, ""));
      nodes.push(node("blockquote", blocks(inner.join("\n"), depth + 1)));
    } else if (ITEM.test(line) && depth < 6) {
      const found = list(lines, at, depth);
      nodes.push(found.list);
      at = found.at;
    } else if (line.includes("|") && at + 1 < lines.length && lines[at + 1].includes("|") && RULE_OF_TABLE.test(lines[at + 1])) {
      const rows = [cells(line)];
      for (at += 2; at < lines.length && lines[at].includes("|"); at += 1) rows.push(cells(lines[at]));
      nodes.push(table(rows));
    } else {
      const paragraph = [line];
      for (at += 1; at < lines.length && lines[at].trim() && !begins(lines[at]); at += 1) paragraph.push(lines[at]);
      nodes.push(node("p", inline(paragraph.join("\n"))));
    }
  }
  return nodes;
}

function list(lines, at, depth) {
  const [, indent, number] = ITEM.exec(lines[at]);
  const made = node(number === undefined ? "ul" : "ol", [], number === undefined ? {} : { start: Number(number) });
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || item[1].length !== indent.length || (item[2] === undefined) !== (number === undefined)) break;
    const inner = [item[3]];
    for (at += 1; at < lines.length; at += 1) {
      const deeper = lines[at].length - lines[at].trimStart().length > indent.length;
      const goesOn = lines[at].trim() ? deeper : at + 1 < lines.length && /^ {2,}\S/.test(lines[at + 1]);
      if (!goesOn) break;
      inner.push(lines[at].slice(Math.min(indent.length + 2, lines[at].length - lines[at].trimStart().length)));
    }
    const content = blocks(inner.join("\n"), depth + 1);
    const isOneLine = content.length && content[0].nodeName === "P";
    made.append(node("li", isOneLine ? [...content[0].childNodes, ...content.slice(1)] : content));
    while (at + 1 < lines.length && !lines[at].trim() && ITEM.test(lines[at + 1])) at += 1;
  }
  return { list: made, at };
}

function codeBlock(text) {
  return node("div", [node("pre", node("code", text), { tabIndex: 0 }), ...copyButton(text)], { className: "code" });
}

// Browsers have a clipboard for pages of this machine and of https only.
function copyButton(text) {
  if (!navigator.clipboard) return [];
  const made = node("button", word("copy"), { type: "button" });
  made.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    made.textContent = word("copied");
  });
  return [made];
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function table(rows) {
  const row = (each, kind) => node("tr", each.map((cell) => node(kind, inline(cell))));
  const [head, ...rest] = rows;
  const made = node("table", [node("thead", row(head, "th")), node("tbody", rest.map((each) => row(each, "td")))]);
  return node("div", made, { className: "table" });
}

// --- state -----------------------------------------------------------------------------------------------------------

let key = "";  // never stored
let model = null;
let turns = [];  // {role, content, about, isStopped, view}
let used = 0;  // tokens of the conversation
let running = null;  // AbortController of the answer that is coming

const headers = () => (key ? { Authorization: `Bearer ${key}` } : {});

async function loadModel() {
  showError("");
  try {
    const answer = await fetch("/v1/models", { headers: headers() });
    if (answer.status === 401) {
      if (key) showError(word("keyWrong"));
      key = "";
      byId("key-form").hidden = false;
      byId("send").disabled = true;
      byId("key").focus();
      return;
    }
    model = (await answer.json()).data[0];
  } catch {
    showError(word("unreachable"));
    return;
  }
  byId("key-form").hidden = true;
  byId("send").disabled = false;
  byId("model").textContent = model.id;
  document.title = model.id;
  const most = byId("max_tokens");
  byId("system").value ||= model.system_prompt;
  most.max = model.max_new_tokens;
  most.value = Math.min(Number(most.value), Math.floor(model.max_model_len / 4), model.max_new_tokens);
  showContext();
  byId("message").focus();
}

function showContext() {
  const share = used / model.max_model_len;
  byId("context").textContent =
    `${used.toLocaleString()} / ${model.max_model_len.toLocaleString()} ${word("tokens")}` +
    (used ? ` (${share.toLocaleString(undefined, { style: "percent", maximumFractionDigits: 1 })})` : "");
}

function showError(text) {
  byId("error").textContent = text;
  byId("error").hidden = !text;
  if (text) byId("error").scrollIntoView({ block: "nearest" });
}

// --- turns -----------------------------------------------------------------------------------------------------------

function button(name, action) {
  const made = node("button", word(name), { type: "button" });
  made.dataset.text = name;
  made.addEventListener("click", action);
  return made;
}

function addTurn(role, content) {
  const turn = { role, content, about: "", isStopped: false };
  turn.text = node("div", [], { className: "text" });
  turn.note = node("span");
  turn.foot = node("div", [], { className: "about" });
  turn.view = node("li", [turn.text, turn.foot], { className: `turn ${role}` });
  turns.push(turn);
  byId("turns").append(turn.view);
  byId("welcome").hidden = true;
  draw(turn);
  return turn;
}

function draw(turn) {
  turn.text.replaceChildren(...(turn.role === "user" ? [turn.content] : blocks(turn.content)));
  const isLast = turn === turns[turns.length - 1];
  const actions = [];
  if (!running) {
    if (turn.role === "user") actions.push(button("edit", () => edit(turn)));
    else {
      actions.push(...copyButton(turn.content));
      if (isLast) actions.push(button("again", () => regenerate(turn)));
    }
  }
  turn.note.textContent = turn.about + (turn.isStopped ? ` ${turn.about ? "· " : ""}${word("stopped")}` : "");
  turn.foot.replaceChildren(turn.note, ...actions);
}

const drawAll = () => turns.forEach(draw);

function cutAt(turn) {
  if (!turns.includes(turn)) return;  // a new chat has begun
  for (const each of turns.splice(turns.indexOf(turn))) each.view.remove();
  byId("welcome").hidden = turns.length > 0;
}

function edit(turn) {
  const area = node("textarea", [], { value: turn.content, rows: Math.min(10, turn.content.split("\n").length + 1) });
  area.setAttribute("aria-label", word("edit"));
  const send = () => {
    if (!area.value.trim() || running) return;
    cutAt(turn);
    ask(area.value);
  };
  const cancel = () => {
    draw(turn);
    byId("message").focus();
  };
  const primary = button("resend", send);
  primary.className = "primary";
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    } else if (event.key === "Escape") cancel();
  });
  const buttons = node("div", [button("cancel", cancel), primary], { className: "line" });
  turn.text.replaceChildren(node("div", [area, buttons], { className: "edit" }));
  turn.foot.replaceChildren();
  area.focus();
}

function regenerate(turn) {
  cutAt(turn);
  answer();
}

// --- asking ----------------------------------------------------------------------------------------------------------

function body() {
  const system = byId("system").value;
  const messages = turns.map(({ role, content }) => ({ role, content }));
  const asked = {
    model: model.id,
    // an empty one, too, if the server would put its own in its place
    messages: system || model.system_prompt ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const name of ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed"]) {
    if (byId(name).value !== "") asked[name] = byId(name).valueAsNumber;
  }
  return asked;
}

function ask(text) {
  addTurn("user", text);
  answer();
}

async function answer() {
  showError("");
  const asked = JSON.stringify(body());
  running = new AbortController();
  const { signal } = running;
  showRunning();
  const turn = addTurn("assistant", "");
  drawAll();
  turn.text.classList.add("waiting");
  scrollDown(true);
  const start = performance.now();
  let first = 0, last = 0, usage = null, reason = null, isDue = false;
  const redraw = () => {
    isDue = false;
    const follows = isAtEnd();
    draw(turn);
    scrollDown(follows);
  };
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: { "Content-Type": "application/json", ...headers() }, body: asked, signal,
    });
    if (!response.ok) throw new Error(response.status === 429 ? word("busy") : (await response.json()).error.message);
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) usage = event.usage;
      for (const choice of event.choices) {
        reason = choice.finish_reason ?? reason;
        if (!choice.delta.content) continue;
        last = performance.now();
        first ||= last;
        turn.content += choice.delta.content;
        if (!isDue) requestAnimationFrame(redraw);
        isDue = true;
      }
    }
  } catch (error) {
    if (signal.aborted) turn.isStopped = true;
    else showError(error instanceof TypeError ? word("unreachable") : error.message);
  }
  running = null;
  turn.text.classList.remove("waiting");
  turn.about = numbers(start, first, last, usage, reason);
  if (usage && turns.includes(turn)) {
    used = usage.total_tokens;
    showContext();
  }
  if (!turn.content && !usage) takeBack(turn);
  showRunning();
  drawAll();
  byId("message").focus();
}

// Stopped or refused before the first token: the message goes back to where it was written.
function takeBack(turn) {
  const question = turns[turns.indexOf(turn) - 1];
  if (!question) return;
  cutAt(question);
  message.value ||= question.content;
  fit();
}

function numbers(start, first, last, usage, reason) {
  if (!first) return "";
  const parts = [`${word("first")} ${((first - start) / 1000).toFixed(2)} s`];
  if (usage) {
    const rate = (usage.completion_tokens - 1) / ((last - first) / 1000);
    if (rate > 0 && Number.isFinite(rate)) parts.push(`${rate.toFixed(1)} ${word("perSecond")}`);
    parts.push(`${usage.completion_tokens} ${word("tokens")}`);
  }
  if (reason === "length") parts.push(word("cut"));
  return parts.join(" · ");
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function isAtEnd() {
  const { scrollTop, clientHeight, scrollHeight } = document.querySelector("main");
  return scrollTop + clientHeight > scrollHeight - 60;
}

function scrollDown(follows) {
  const main = document.querySelector("main");
  if (follows) main.scrollTop = main.scrollHeight;
}

function showRunning() {
  byId("send").hidden = Boolean(running);
  byId("stop").hidden = !running;
}

// --- controls --------------------------------------------------------------------------------------------------------

const message = byId("message");

function fit() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight + 2}px`;
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = message.value;
  if (running || !model || !text.trim()) return;
  if (!byId("settings").reportValidity()) return;
  message.value = "";
  fit();
  ask(text);
});
message.addEventListener("input", fit);
message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("new").addEventListener("click", () => {
  running?.abort();
  if (turns.length) cutAt(turns[0]);
  showError("");
  used = 0;
  if (model) showContext();
  message.focus();
});
byId("language").addEventListener("click", () => {
  language = language === "en" ? "zh" : "en";
  showWords();
  if (model) showContext();
  if (!running) drawAll();
});
byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
});
byId("settings-button").addEventListener("click", () => {
  const isHidden = byId("settings").hidden;
  byId("settings").hidden = !isHidden;
  byId("settings-button").setAttribute("aria-expanded", String(isHidden));
});
byId("settings").addEventListener("submit", (event) => event.preventDefault());
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("key").value.trim();
  byId("key").value = "";
  loadModel();
});

showWords();
loadModel();
