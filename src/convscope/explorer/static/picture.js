"use strict";
// A picture's page: classes, heatmaps, what is set beside them, uploads.
(() => {
  const controls = document.getElementById("controls");
  const main = find('[data-stage="main"]'), beside = find('[data-stage="beside"]');
  const state = { target: page.target, shown: { main: null, beside: null } };
  const known = new Map();
  let asking = {}, measuring = null;

  const setting = (name) => (controls.elements[name] ? controls.elements[name].value : "");
  const look = () => {
    const signed = setting("sign") === "signed";
    const name = signed && setting("colours") === "jet" ? "coolwarm" : setting("colours");
    return { palette: page.palettes[name], signed, opacity: setting("opacity") / 100 };
  };
  const query = (target) => {
    const asked = new URLSearchParams({ target });
    for (const name of ["method", "layer", "against"]) if (setting(name)) asked.set(name, setting(name));
    return asked;
  };
  const plain = () => !setting("layer") && !setting("against") && ["", "grad-cam"].includes(setting("method"));

  function show(stage, heat, caption) {
    state.shown[stage.dataset.stage] = heat;
    const canvas = find("canvas", stage);
    paint(canvas, heat.map, look());
    canvas.setAttribute("aria-label", `Heatmap of ${heat.name}, ${heat.method} at ${heat.layer}`);
    find(".caption", stage).textContent = caption;
  }

  async function heatOf(stage, api, target) {
    const name = stage.dataset.stage;
    if (asking[name]) asking[name].abort();
    if (api === page.api && plain() && page.heats[target]) return page.heats[target];
    const address = `${api}/heatmap?${query(target)}`;
    if (known.has(address)) return known.get(address);
    asking[name] = new AbortController();
    stage.classList.add("waiting");
    try {
      const heat = await ask(address, { signal: asking[name].signal });
      known.set(address, heat);
      return heat;
    } finally {
      stage.classList.remove("waiting");
    }
  }

  const caption = (heat) => `${heat.name}${heat.against === null ? "" : `, rather than ${className(heat.against)}`} · ${heat.method} at ${heat.layer}`;
  const className = (index) => { const link = find(`[data-class="${index}"] .name`); return link ? link.textContent : `class ${index}`; };

  async function refresh() {
    try {
      const heat = await heatOf(main, page.api, state.target);
      show(main, heat, caption(heat));
      const notes = document.getElementById("notes");
      notes.hidden = !heat.notes.length;
      notes.textContent = heat.notes.join(" ");
      const title = document.getElementById("target-name");
      title.textContent = heat.name;
      if (page.classPages[heat.target]) title.href = page.classPages[heat.target];
      else if (page.live) title.href = `/m/${page.api.split("/")[3]}/class/${heat.target}`;
      lines(heat);
      await refreshBeside();
      measure();
    } catch (error) {
      if (error.name !== "AbortError") say(error.message);
    }
  }

  async function refreshBeside() {
    const [kind, value] = setting("beside").split(/:(.*)/);
    beside.hidden = !kind;
    if (!kind) return;
    const image = find("img", beside), own = find("img", main);
    const api = kind === "picture" ? page.api.replace(/[^/]+$/, value) : page.api;
    const source = kind === "picture" ? own.src.replace(/picture=[^&]+/, `picture=${value}`) : own.src;
    if (image.src !== source) {
      image.src = source;
      image.alt = kind === "picture" ? "the other picture" : own.alt;
      image.removeAttribute("width");
      image.removeAttribute("height");
      await image.decode().catch(() => {});
    }
    const heat = await heatOf(beside, api, kind === "class" ? Number(value) : state.target);
    show(beside, heat, caption(heat));
  }

  function lines(heat) {
    const known = plain() && page.lines[heat.target];
    const given = heat.lines || known;
    if (given) for (const [name, text] of Object.entries(given)) {
      const code = find(`[data-line="${name}"]`);
      if (code) code.textContent = text;
    }
    const png = document.getElementById("get-png");
    if (!png) return;
    const asked = query(heat.target);
    document.getElementById("get-npz").href = `${page.api}/heatmap.npz?${asked}`;
    asked.set("opacity", setting("opacity") / 100);
    asked.set("colours", setting("colours"));
    png.href = `${page.api}/heatmap.png?${asked}`;
  }

  function measure() {
    const box = document.getElementById("truth");
    if (!box) return;
    if (measuring) measuring.abort();
    clearTimeout(measure.timer);
    box.textContent = "Measuring…";
    measure.timer = setTimeout(async () => {
      measuring = new AbortController();
      try {
        const told = await ask(`${page.api}/faithfulness?${query(state.target)}`, { signal: measuring.signal });
        const curves = make("div", { class: "curves" });
        for (const row of told.rows) {
          const points = row.curve.map((v, i) => `${100 * i / (row.curve.length - 1)},${100 - 100 * v}`).join(" ");
          curves.append(make("div", {},
            make("span", {}, `${row.metric} `, make("strong", {}, row.mean.toFixed(2)), ` (${row.better} is better)`),
            make("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img", "aria-label": `Curve of ${row.metric}: ${row.says}` }, make("polyline", { points }))));
        }
        box.replaceChildren(curves, ...told.notes.map((note) => make("p", { class: "warn" }, note)));
      } catch (error) {
        if (error.name !== "AbortError") box.textContent = error.message;
      }
    }, 250);
  }

  function choose(target, push = true) {
    state.target = Number(target);
    findAll("#classes a").forEach((a) => (Number(a.dataset.class) === state.target ? a.setAttribute("aria-current", "true") : a.removeAttribute("aria-current")));
    if (push) {
      const link = page.pages[state.target] || (page.live && `/m/${page.api.split("/")[3]}/picture/${page.picture}/class/${state.target}`);
      if (link && page.live) history.pushState({ target: state.target }, "", link + location.search);
    }
    refresh();
  }

  document.getElementById("classes").addEventListener("click", (event) => {
    const link = event.target.closest("[data-class]");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    choose(link.dataset.class);
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
    const link = /^[1-9]$/.test(event.key) && findAll("#classes [data-class]")[Number(event.key) - 1];
    if (link) choose(link.dataset.class);
  });
  addEventListener("popstate", (event) => choose(event.state ? event.state.target : page.target, false));

  const repaint = () => {
    for (const stage of [main, beside]) {
      const heat = state.shown[stage.dataset.stage];
      if (heat && !stage.hidden) paint(find("canvas", stage), heat.map, look());
    }
    scale();
  };
  function scale() {
    const bar = document.getElementById("scale"), given = look();
    const image = new ImageData(256, 1);
    for (let i = 0; i < 256; i++) image.data.set([...colour(given.palette, i / 255), 255], 4 * i);
    bar.getContext("2d").putImageData(image, 0, 0);
    document.getElementById("scale-low").textContent = given.signed ? "against" : "none";
    document.getElementById("scale-high").textContent = given.signed ? "for" : "most evidence";
  }
  function remember() {
    const asked = new URLSearchParams();
    for (const control of controls.elements) if (control.name && !isDefault(control)) asked.set(control.name, control.value);
    if (page.live) history.replaceState(history.state, "", location.pathname + (asked.size ? `?${asked}` : ""));
  }
  const isDefault = (control) => control.value === (control.tagName === "SELECT" ? ([...control.options].find((o) => o.defaultSelected) || control.options[0]).value : control.defaultValue);
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.addEventListener("input", (event) => {
    remember();
    if (["opacity", "colours", "sign"].includes(event.target.name)) {
      repaint();
      if (state.shown.main) lines(state.shown.main);
    } else refresh();
  });
  new ResizeObserver(repaint).observe(find(".frame", main));

  // Another class, by name or number.
  const form = document.getElementById("other-class");
  if (form) {
    const input = document.getElementById("find-class"), list = document.getElementById("found-classes");
    const search = async () => (await ask(`/api/models/${page.api.split("/")[3]}/classes?search=${encodeURIComponent(input.value)}`)).classes;
    input.addEventListener("input", async () => {
      if (input.value.trim()) list.replaceChildren(...(await search()).map((c) => make("option", { value: c.name })));
    });
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const found = await search();
      if (found.length) choose(found[0].index);
      else say(`No class is called ${input.value}.`);
    });
  }

  // Pictures that are dropped, pasted or chosen; the browser remembers them, the explorer knows them by what they show.
  const remembered = () => { try { return JSON.parse(localStorage.getItem("pictures") || "[]"); } catch { return []; } };
  function pin(entries) {
    const strip = document.getElementById("strip");
    for (const { key, name } of entries) {
      if (find(`[data-picture="${CSS.escape(key)}"]`, strip)) continue;
      const image = make("img", { src: `/image/photo?picture=${encodeURIComponent(key)}&longest=160`, alt: name, width: 96, height: 64 });
      const link = make("a", { href: `/m/${page.api.split("/")[3]}/picture/${encodeURIComponent(key)}`, "data-picture": key, title: name }, image);
      if (key === page.picture) link.setAttribute("aria-current", "page");
      const item = make("li", {}, link);
      strip.append(item);
      const others = document.getElementById("beside-pictures");
      if (others && key !== page.picture) others.append(make("option", { value: `picture:${key}` }, name));
      image.addEventListener("error", () => item.remove());
    }
  }
  async function bring(files) {
    const pictures = [...files].filter((file) => file.type.startsWith("image/") || file.type === "").slice(0, 64);
    const brought = [];
    for (const file of pictures) {
      say(pictures.length > 1 ? `Reading ${brought.length + 1} of ${pictures.length}…` : "Reading the picture…");
      try {
        brought.push(await ask(`/api/pictures?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } }));
      } catch (error) {
        say(`${file.name}: ${error.message}`);
      }
    }
    if (!brought.length) return;
    const kept = [...brought.map(({ key, name }) => ({ key, name })), ...remembered()];
    const distinct = kept.filter((p, i) => kept.findIndex((q) => q.key === p.key) === i).slice(0, 24);
    try { localStorage.setItem("pictures", JSON.stringify(distinct)); } catch { /* it is only a convenience */ }
    location.href = `/m/${page.api.split("/")[3]}/picture/${brought[0].key}`;
  }
  if (page.live) {
    pin(remembered());
    for (const id of ["files", "folder"]) document.getElementById(id).addEventListener("change", (event) => bring(event.target.files));
    addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
    addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
    addEventListener("drop", (event) => { event.preventDefault(); document.body.classList.remove("dropping"); bring(event.dataTransfer.files); });
    addEventListener("paste", (event) => { if (event.clipboardData.files.length) bring(event.clipboardData.files); });
  }

  for (const [name, value] of new URLSearchParams(location.search)) {
    const control = controls.elements[name];
    if (control && (control.tagName !== "SELECT" || [...control.options].some((o) => o.value === value))) control.value = value;
  }
  refresh();
  scale();
})();
