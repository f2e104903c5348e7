// The explorer in a notebook. Pages run in a sandboxed frame without a network; all that they request travels over the
// widget's channel to the application in the kernel. Until the kernel answers, the snapshot is shown: first that of the
// kernel, then the page of an image as it last stood.

// --- in the frame: its source text becomes part of each page ---------------------------------------------------------

// Replace what a page uses to reach its server, then run the page's own scripts.
function startPage(runScripts) {
  const ORIGIN = "http://explorer";
  const listen = (event) => {
    if (event.source !== parent || !event.ports.length) return;
    removeEventListener("message", listen);
    connect(event.ports[0], event.data);
  };
  addEventListener("message", listen);

  function connect(port, { path, storage }) {
    const address = new URL(path, ORIGIN);
    const post = (message, transfer = []) => port.postMessage(message, transfer);

    // The path on the server that a URL stands for; null if it stands for something else.
    const toPath = (url) => {
      const resolved = new URL(url, address);
      return resolved.origin === ORIGIN ? resolved.pathname + resolved.search : null;
    };
    const navigate = (url, replace = false) => post({ kind: "navigate", path: toPath(url), replace });

    // Requests.
    const calls = new Map();
    let lastId = 0;
    port.onmessage = ({ data }) => { if (calls.has(data.id)) calls.get(data.id)(data); };

    async function fetch(url, { method = "GET", headers = {}, body, signal } = {}) {
      const content = body === undefined ? null : await new Response(body).arrayBuffer();
      return new Promise((resolve, reject) => {
        const id = ++lastId;
        let controller;
        const end = (error) => {
          calls.delete(id);
          reject(error);
          controller.error(error);
        };
        const abort = () => {
          if (!calls.has(id)) return;
          post({ kind: "abort", id });
          end(new DOMException("The request was aborted.", "AbortError"));
        };
        const stream = new ReadableStream({ start: (c) => { controller = c; } });
        calls.set(id, (reply) => {
          if (reply.kind === "error") end(new TypeError(reply.error));
          else if (reply.kind === "start") {
            const isEmpty = [204, 205, 304].includes(reply.status);
            resolve(new Response(isEmpty ? null : stream, { status: reply.status, headers: reply.headers }));
          } else {
            if (reply.content.byteLength) controller.enqueue(new Uint8Array(reply.content));
            if (!reply.more) { calls.delete(id); controller.close(); }
          }
        });
        if (signal && signal.aborted) { abort(); return; }
        if (signal) signal.addEventListener("abort", abort);
        post({ kind: "request", id, method, path: toPath(url), headers, content }, content ? [content] : []);
      });
    }

    class EventSource extends EventTarget {
      static OPEN = 1;
      static CLOSED = 2;
      readyState = 0;
      #controller = new AbortController();
      constructor(url) { super(); this.#read(url); }
      async #read(url) {
        try {
          const response = await fetch(url, { headers: { accept: "text/event-stream" }, signal: this.#controller.signal });
          if (!response.ok) throw new Error(response.statusText);
          this.readyState = EventSource.OPEN;
          const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
          let text = "";
          for (let part = await reader.read(); !part.done; part = await reader.read()) {
            const events = (text + part.value).split("\n\n");
            text = events.pop();
            events.forEach((event) => this.#dispatch(event));
          }
        } catch { /* `onerror` tells it */ }
        if (this.readyState === EventSource.CLOSED) return;
        this.readyState = EventSource.CLOSED;
        if (this.onerror) this.onerror();
      }
      #dispatch(event) {
        const fields = event.split("\n").map((line) => /^(\w+): ?(.*)$/.exec(line)).filter(Boolean);
        const data = fields.filter((field) => field[1] === "data").map((field) => field[2]).join("\n");
        const type = fields.find((field) => field[1] === "event");
        if (this.readyState !== EventSource.CLOSED) this.dispatchEvent(new MessageEvent(type ? type[2] : "message", { data }));
      }
      close() { this.readyState = EventSource.CLOSED; this.#controller.abort(); }
    }

    // The address of the page.
    const location = {
      get href() { return address.href; },
      set href(url) { navigate(url); },
      get pathname() { return address.pathname; },
      get search() { return address.search; },
      set search(query) { navigate(`?${String(query).replace(/^\?/, "")}`); },
      get hash() { return address.hash; },
      assign: (url) => navigate(url),
      replace: (url) => navigate(url, true),
      reload: () => navigate(address, true),
    };
    const changeAddress = (replace) => (state, _, url) => {
      history.state = state;
      address.href = new URL(url, address).href;
      post({ kind: "address", path: toPath(address), replace });
    };
    const history = { state: null, pushState: changeAddress(false), replaceState: changeAddress(true) };
    const localStorage = {
      getItem: (key) => (key in storage ? storage[key] : null),
      setItem: (key, value) => { storage[key] = String(value); post({ kind: "store", key, value: String(value) }); },
    };

    // Images: the URL that a page sets is fetched, and what is shown is its content.
    const contents = new Map();
    const contentUrl = (path) => {
      if (!contents.has(path)) {
        contents.set(path, fetch(path).then((response) => {
          if (!response.ok) throw new Error(`status ${response.status}`);
          return response.blob();
        }).then((blob) => URL.createObjectURL(blob)));
      }
      return contents.get(path);
    };
    const sources = new WeakMap();  // of image elements: the URL as the page knows it, and when it is loaded
    function setSource(element, url, show) {
      const path = toPath(url);
      if (path === null) { sources.delete(element); show(url); return; }
      const source = { href: new URL(url, address).href };
      sources.set(element, source);
      source.done = contentUrl(path).then(
        (content) => { if (sources.get(element) === source) show(content); },
        () => { if (sources.get(element) === source) element.dispatchEvent(new Event("error")); },
      );
    }
    const setAttribute = Element.prototype.setAttribute;
    const nativeSource = Object.getOwnPropertyDescriptor(HTMLImageElement.prototype, "src");
    Object.defineProperty(HTMLImageElement.prototype, "src", {
      get() { return sources.has(this) ? sources.get(this).href : nativeSource.get.call(this); },
      set(url) { setSource(this, url, (content) => nativeSource.set.call(this, content)); },
    });
    Element.prototype.setAttribute = function (name, value) {
      if (this instanceof HTMLImageElement && name === "src") this.src = value;
      else if (this instanceof SVGImageElement && name === "href") setSource(this, value, (content) => setAttribute.call(this, name, content));
      else setAttribute.call(this, name, value);
    };
    const decode = HTMLImageElement.prototype.decode;
    HTMLImageElement.prototype.decode = async function () {
      if (sources.has(this)) await sources.get(this).done;
      return decode.call(this);
    };
    document.querySelectorAll("[data-routed]").forEach((element) => {
      element.setAttribute(element instanceof HTMLImageElement ? "src" : "href", element.dataset.routed);
    });

    // Links and forms; the handlers of the page, on elements and the document, come first.
    async function download(url, name) {
      const response = await fetch(url);
      if (!response.ok) return;
      const named = /filename="([^"]+)"/.exec(response.headers.get("content-disposition") || "");
      const link = document.createElement("a");
      link.href = URL.createObjectURL(await response.blob());
      link.download = name || (named ? named[1] : new URL(url, address).pathname.split("/").pop());
      link.dispatchEvent(new MouseEvent("click"));
    }
    addEventListener("click", (event) => {
      const link = event.target.closest("a[href]");
      if (event.defaultPrevented || !link) return;
      const url = link.getAttribute("href");
      if (toPath(url) === null) { link.setAttribute("target", "_blank"); link.setAttribute("rel", "noopener"); return; }
      event.preventDefault();
      if (url.startsWith("#")) {
        address.hash = url;
        const element = document.getElementById(decodeURIComponent(url.slice(1)));
        if (element) element.scrollIntoView();
      } else if (link.hasAttribute("download")) download(url, link.getAttribute("download"));
      else navigate(url);
    });
    addEventListener("submit", (event) => {
      if (event.defaultPrevented) return;
      event.preventDefault();
      const form = event.target, fields = new URLSearchParams(new FormData(form));
      const target = new URL(form.getAttribute("action") || "", address);
      if (form.method === "post") post({ kind: "navigate", path: toPath(target), method: "POST" });
      else { target.search = fields; navigate(target); }
    });

    // The page as it stands, without scripts and requests.
    function takeSnapshot() {
      const copy = document.documentElement.cloneNode(true);
      const copies = copy.querySelectorAll("img, canvas");
      document.querySelectorAll("img, canvas").forEach((element, i) => {
        const { width, height } = element.getBoundingClientRect();
        if (!width || !height) return;
        const canvas = Object.assign(document.createElement("canvas"), { width, height });
        canvas.getContext("2d").drawImage(element, 0, 0, width, height);
        const content = canvas.toDataURL("image/webp", 0.85);
        if (element instanceof HTMLImageElement) setAttribute.call(copies[i], "src", content);
        else copies[i].style.background = `url(${content}) 0 0 / 100% 100%`;
      });
      copy.querySelectorAll("script, meta[http-equiv]").forEach((element) => element.remove());
      post({ kind: "snapshot", html: `<!doctype html>${copy.outerHTML}` });
    }
    if (document.getElementById("controls")) {  // of pages of images
      let timer = 0;
      const schedule = () => { clearTimeout(timer); timer = setTimeout(takeSnapshot, 1000); };
      new MutationObserver(schedule).observe(document.body, { attributes: true, childList: true, subtree: true });
      schedule();
    }

    runScripts(location, history, fetch, EventSource, localStorage);
    if (address.hash) document.getElementById(decodeURIComponent(address.hash.slice(1)))?.scrollIntoView();
  }
}

// --- in the notebook -------------------------------------------------------------------------------------------------

const POLICY = (nonce) => `default-src 'none'; script-src 'nonce-${nonce}'; style-src 'unsafe-inline'; img-src blob: data:; form-action 'none'; base-uri 'none'`;
const MAX_REDIRECTS = 5;

// Requests over the channel of a widget, for one of its views.
class Channel {
  constructor(model) {
    this.model = model;
    this.prefix = Math.random().toString(36).slice(2);
    this.lastId = 0;
    this.calls = new Map();
    this.onMessage = (content, buffers) => {
      const call = this.calls.get(content.id);
      if (!call) return;
      if (content.kind === "error" || content.more === false) this.calls.delete(content.id);
      const part = buffers && buffers.length ? buffers[0] : new DataView(new ArrayBuffer(0));
      const bytes = new Uint8Array(part.buffer || part, part.byteOffset || 0, part.byteLength);
      call({ ...content, content: bytes.slice().buffer });
    };
    model.on("msg:custom", this.onMessage);
  }

  // Begin a request; returns a function that aborts it.
  start({ method, path, headers = {}, content = null }, onReply) {
    const id = `${this.prefix}-${++this.lastId}`;
    this.calls.set(id, onReply);
    this.model.send({ kind: "request", id, method, path, headers }, undefined, content ? [content] : []);
    return () => {
      if (this.calls.delete(id)) this.model.send({ kind: "abort", id });
    };
  }

  fetch(method, path) {
    return new Promise((resolve, reject) => {
      const parts = [];
      let start;
      this.start({ method, path }, (reply) => {
        if (reply.kind === "error") reject(new Error(reply.error));
        else if (reply.kind === "start") start = reply;
        else {
          parts.push(reply.content);
          if (!reply.more) new Response(new Blob(parts)).text().then((text) => resolve({ ...start, text }));
        }
      });
    });
  }

  close() {
    this.model.off("msg:custom", this.onMessage);
    for (const id of this.calls.keys()) this.model.send({ kind: "abort", id });
  }
}

class Explorer {
  constructor(model, element) {
    this.model = model;
    this.channel = new Channel(model);
    this.height = model.get("height");
    this.files = new Map();  // scripts and style sheets by URL
    this.storage = {};  // of all pages
    this.visited = [];
    this.running = new Map();  // requests of the page that is shown
    this.back = Object.assign(document.createElement("button"), { textContent: "‹ Back", title: "Back to the previous page", hidden: true });
    this.back.style.cssText = "position:absolute; right:.7em; bottom:.7em; z-index:1; opacity:.8";
    this.back.onclick = () => { this.visited.pop(); this.open(this.visited.pop()); };
    this.box = document.createElement("div");
    this.box.style.cssText = "position:relative; border:1px solid #8888; border-radius:6px; overflow:hidden; min-height:6em";
    this.box.innerHTML = model.get("snapshot");
    element.append(this.box);
  }

  async open(path, method = "GET") {
    const ticket = (this.ticket = {});
    let response = await this.channel.fetch(method, path);
    for (let i = 0; i < MAX_REDIRECTS && response.status >= 300 && response.status < 400; i++) {
      path = new URL(response.headers.location, new URL(path, "http://explorer"));
      path = path.pathname + path.search;
      response = await this.channel.fetch("GET", path);
    }
    const content = await this.assemble(response.text);
    if (ticket === this.ticket) this.show(path, content);
  }

  file(path) {
    if (!this.files.has(path)) this.files.set(path, this.channel.fetch("GET", path).then(({ text }) => text));
    return this.files.get(path);
  }

  // Put scripts and styles into the page, so that it needs no network.
  async assemble(html) {
    const page = new DOMParser().parseFromString(html, "text/html");
    const nonce = crypto.randomUUID();
    const takeFiles = async (selector, attribute) => {
      const elements = [...page.querySelectorAll(selector)];
      elements.forEach((element) => element.remove());
      return (await Promise.all(elements.map((element) => this.file(element.getAttribute(attribute))))).join("\n");
    };
    const styles = await takeFiles("link[rel=stylesheet]", "href");
    const scripts = await takeFiles("script[src]", "src");
    page.querySelectorAll("link").forEach((link) => link.remove());
    page.querySelectorAll("img[src^='/'], svg image[href^='/']").forEach((image) => {
      const attribute = image.localName === "img" ? "src" : "href";
      image.dataset.routed = image.getAttribute(attribute);
      image.removeAttribute(attribute);
    });
    const policy = page.createElement("meta");
    policy.httpEquiv = "Content-Security-Policy";
    policy.content = POLICY(nonce);
    const style = page.createElement("style");
    style.textContent = styles;
    page.head.prepend(policy, style);
    const script = page.createElement("script");
    script.setAttribute("nonce", nonce);
    const code = `(${startPage})((location, history, fetch, EventSource, localStorage) => {"use strict";\n${scripts}\n});`;
    script.textContent = code.replaceAll("</script", "<\\/script");
    page.body.append(script);
    return `<!doctype html>${page.documentElement.outerHTML}`;
  }

  show(path, content) {
    this.stopRequests();
    this.visited.push(path);
    const frame = document.createElement("iframe");
    frame.title = "convscope explorer";
    frame.setAttribute("sandbox", "allow-scripts allow-forms allow-downloads allow-popups allow-popups-to-escape-sandbox");
    frame.style.cssText = `display:block; width:100%; height:${this.height}px; border:0`;
    frame.srcdoc = content;
    frame.onload = () => {
      const { port1, port2 } = new MessageChannel();
      port1.onmessage = ({ data }) => this.onPageMessage(port1, data);
      frame.contentWindow.postMessage({ path, storage: this.storage }, "*", [port2]);
    };
    this.box.replaceChildren(frame, this.back);
    this.back.hidden = this.visited.length < 2;
  }

  onPageMessage(port, message) {
    const { kind, id, path } = message;
    if (kind === "request") {
      this.running.set(id, this.channel.start(message, (reply) => port.postMessage({ ...reply, id }, [reply.content])));
    } else if (kind === "abort") this.running.get(id)?.();
    else if (kind === "snapshot") this.keep(message.html);
    else if (kind === "store") this.storage[message.key] = message.value;
    else if (kind === "navigate") {
      if (message.replace) this.visited.pop();
      this.open(path, message.method);
    } else if (kind === "address") {
      if (message.replace) this.visited.pop();
      this.visited.push(path);
      this.back.hidden = this.visited.length < 2;
    }
  }

  // Keep the page as it stands with the notebook.
  keep(html) {
    const text = html.replaceAll("&", "&amp;").replaceAll('"', "&quot;");
    this.model.set("snapshot", `<iframe sandbox srcdoc="${text}" title="convscope explorer" style="width:100%; height:${this.height}px; border:0"></iframe>`);
    this.model.save_changes();
  }

  stopRequests() {
    for (const abort of this.running.values()) abort();
    this.running.clear();
  }

  close() {
    this.stopRequests();
    this.channel.close();
  }
}

function render({ model, el }) {
  // The same snapshot is an output of its own, for exported notebooks in which no script runs.
  const style = document.createElement("style");
  style.textContent = `.${model.get("static_class")} { display: none; }`;
  el.append(style);
  const explorer = new Explorer(model, el);
  explorer.open("/");
  return () => explorer.close();
}

export default { render };
