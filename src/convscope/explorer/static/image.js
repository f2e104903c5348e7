"use strict";
// Image page: classes, heatmaps, a second heatmap to compare with, and uploads.
(() => {
  const controls = document.getElementById("controls");
  const main = find('[data-stage="main"]'), comparison = find('[data-stage="comparison"]');
  const state = { target: page.target, box: null, heatmaps: { main: null, comparison: null } };
  const cache = new Map(), requests = {};
  let faithfulnessRequest = null;

  const setting = (name) => (controls.elements[name] ? controls.elements[name].value : "");
  // By default evidence against is shown where the method is signed.
  const isSigned = (heatmap) => (setting("evidence") ? setting("evidence") === "signed" : heatmap.signed);
  const colormapName = (heatmap) => setting("colormap") || (isSigned(heatmap) ? page.diverging : page.sequential);
  const paintOptions = (heatmap) => ({
    colormap: page.colormaps[colormapName(heatmap)], signed: isSigned(heatmap), atInput: heatmap.layer === "input", opacity: setting("opacity") / 100,
  });
  function paintHeatmap(stage, heatmap) {
    const options = paintOptions(heatmap);
    stage.classList.toggle("signed", options.signed);
    paint(find("canvas", stage), heatmap.map, options);
  }
  const heatmapQuery = (target, box) => {
    const query = new URLSearchParams({ target });
    if (box !== null) query.set("box", box);
    for (const name of ["method", "layer", "against"]) if (setting(name)) query.set(name, setting(name));
    return query;
  };
  // The page comes with the default heatmaps of the top classes.
  const isDefaultMethod = () => !setting("layer") && !setting("against") && ["", page.method].includes(setting("method"));
  const modelUrl = `/m/${encodeURIComponent(page.model)}`;
  const className = (index) => { const name = find(`[data-class="${index}"] .name`); return name ? name.textContent : `${page.noun} ${index}`; };
  const captionOf = (heatmap) => `${heatmap.name}${heatmap.box === null ? "" : `, box ${heatmap.box}`}${heatmap.against === null ? "" : ` in contrast with ${className(heatmap.against)}`} · ${heatmap.method} at ${heatmap.layer}`;

  function showHeatmap(stage, heatmap) {
    state.heatmaps[stage.dataset.stage] = heatmap;
    paintHeatmap(stage, heatmap);
    find("canvas", stage).setAttribute("aria-label", `Heatmap of ${captionOf(heatmap)}`);
    find(".caption", stage).textContent = captionOf(heatmap);
  }

  async function fetchHeatmap(stage, api, target, box = null) {
    const name = stage.dataset.stage;
    if (requests[name]) requests[name].abort();
    const known = box === null ? page.heatmaps[target] : page.boxHeatmaps[box];
    if (api === page.api && isDefaultMethod() && known) return known;
    const url = `${api}/heatmap?${heatmapQuery(target, box)}`;
    if (cache.has(url)) return cache.get(url);
    requests[name] = new AbortController();
    stage.classList.add("waiting");
    try {
      const heatmap = await fetchJson(url, { signal: requests[name].signal });
      cache.set(url, heatmap);
      return heatmap;
    } finally {
      stage.classList.remove("waiting");
    }
  }

  async function update() {
    try {
      const heatmap = await fetchHeatmap(main, page.api, state.target, state.box);
      showHeatmap(main, heatmap);
      drawScale(heatmap);
      const notes = document.getElementById("notes");
      notes.hidden = !heatmap.notes.length;
      notes.textContent = heatmap.notes.join(" ");
      const title = document.getElementById("target-name");
      title.textContent = heatmap.name;
      if (page.classPages[heatmap.target]) title.href = page.classPages[heatmap.target];
      else if (page.live) title.href = `${modelUrl}/class/${heatmap.target}`;
      updateLinks(heatmap);
      await updateComparison();
      updateFaithfulness();
      updateExplanation();
    } catch (error) {
      if (error.name !== "AbortError") showStatus(error.message);
    }
  }

  async function updateComparison() {
    const [kind, value] = setting("compare").split(/:(.*)/);
    comparison.hidden = !kind;
    if (!kind) return;
    const image = find("img", comparison), mainImage = find("img", main);
    const api = kind === "image" ? page.api.replace(/[^/]+$/, value) : page.api;
    const source = kind === "image" ? mainImage.src.replace(/image=[^&]+/, `image=${value}`) : mainImage.src;
    if (image.src !== source) {
      image.src = source;
      image.alt = kind === "image" ? controls.elements.compare.selectedOptions[0].textContent : mainImage.alt;
      image.removeAttribute("width");
      image.removeAttribute("height");
      await image.decode().catch(() => {});
    }
    showHeatmap(comparison, await fetchHeatmap(comparison, api, kind === "class" ? Number(value) : state.target));
  }

  // Code and downloads follow the settings.
  function updateLinks(heatmap) {
    const code = heatmap.snippets || (isDefaultMethod() && heatmap.box === null && page.code[heatmap.target]);
    if (code) for (const [language, text] of Object.entries(code)) {
      const element = find(`[data-language="${language}"]`);
      if (element) element.textContent = text;
    }
    const png = document.getElementById("get-png");
    if (!png) return;
    const query = heatmapQuery(heatmap.target, heatmap.box);
    document.getElementById("get-npz").href = `${page.api}/heatmap.npz?${query}`;
    query.set("opacity", setting("opacity") / 100);
    query.set("colormap", colormapName(heatmap));
    query.set("signed", isSigned(heatmap));
    png.href = `${page.api}/heatmap.png?${query}`;
  }

  // The few units that carry the class, each with its region on the image.
  let explanationRequest = null;
  async function updateExplanation() {
    const sentence = document.getElementById("explanation-sentence"), list = document.getElementById("explanation-units");
    if (!sentence) return;
    if (explanationRequest) explanationRequest.abort();
    explanationRequest = new AbortController();
    sentence.textContent = "Computing…";
    list.replaceChildren();
    const query = new URLSearchParams({ target: state.target });
    if (setting("layer")) query.set("layer", setting("layer"));
    try {
      const result = page.live ? await fetchJson(`${page.api}/explanation?${query}`, { signal: explanationRequest.signal }) : page.explanations[state.target];
      if (!result) { sentence.textContent = "Published pages explain the classes in the list."; return; }
      sentence.textContent = result.sentence;
      const photo = find("img", main);
      const noun = result.layer.endsWith("/dictionary") ? "feature" : "unit";
      for (const row of result.units) {
        const frame = createElement("div", { class: "frame" }, createElement("img", { src: photo.src, alt: "" }));
        const amount = row.share === null ? row.effect.toFixed(2) : `${Math.round(100 * row.share)}%`;
        const link = page.live ? `${modelUrl}/unit/${encodeURIComponent(result.layer)}/${row.unit}?image=${encodeURIComponent(page.image)}` : row.page;
        list.append(createElement("li", {}, createElement("a", link ? { href: link } : {}, frame,
          createElement("span", { class: "name" }, row.name || `${noun} ${row.unit}`),
          createElement("span", { class: "soft" }, [amount, row.position].filter(Boolean).join(", ")))));
        if (row.map) {
          const canvas = createElement("canvas", { role: "img", "aria-label": `Contribution of ${noun} ${row.unit}` });
          frame.append(canvas);
          const draw = () => paint(canvas, row.map, { colormap: page.colormaps[page.sequential], signed: false, opacity: 0.55 });
          draw();
          new ResizeObserver(draw).observe(frame);
        }
      }
    } catch (error) {
      if (error.name !== "AbortError") sentence.textContent = error.message;
    }
  }

  function updateFaithfulness() {
    const box = document.getElementById("faithfulness");
    if (!box) return;
    if (faithfulnessRequest) faithfulnessRequest.abort();
    clearTimeout(updateFaithfulness.timer);
    box.textContent = "Computing…";
    updateFaithfulness.timer = setTimeout(async () => {
      faithfulnessRequest = new AbortController();
      try {
        const result = await fetchJson(`${page.api}/faithfulness?${heatmapQuery(state.target, state.box)}`, { signal: faithfulnessRequest.signal });
        const curves = createElement("div", { class: "curves" });
        // Probabilities lie between 0 and 1; values are drawn from the least to the largest of both curves.
        const points = result.rows.flatMap((row) => row.curve);
        const [low, high] = page.hasValues ? [Math.min(...points), Math.max(...points)] : [0, 1];
        const format = (v) => (page.hasValues ? v.toPrecision(3) : v.toFixed(2));
        const axis = page.hasValues ? `; vertical axis from ${format(low)} to ${format(high)}` : "";
        for (const row of result.rows) {
          const points = row.curve.map((v, i) => `${100 * i / (row.curve.length - 1)},${100 - 100 * (v - low) / (high - low || 1)}`).join(" ");
          curves.append(createElement("div", {},
            createElement("span", {}, `${row.metric} `, createElement("strong", {}, format(row.mean)), ` (${row.better} is better${axis})`),
            createElement("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img", "aria-label": `Curve of ${row.metric}: ${row.description}` }, createElement("polyline", { points }))));
        }
        box.replaceChildren(curves, ...result.notes.map((note) => createElement("p", { class: "warn" }, note)));
      } catch (error) {
        if (error.name !== "AbortError") box.textContent = error.message;
      }
    }, 250);
  }

  const markCurrent = (selector, isCurrent) => findAll(selector).forEach((element) => (isCurrent(element) ? element.setAttribute("aria-current", "true") : element.removeAttribute("aria-current")));
  function select(target, box) {
    Object.assign(state, { target: Number(target), box });
    markCurrent("#classes a", (link) => box === null && Number(link.dataset.class) === state.target);
    markCurrent("[data-box]", (element) => Number(element.dataset.box) === box);
  }
  // A detected box: its number is the fragment of the address.
  function selectBox(number) {
    const box = page.boxes[number];
    if (!box) return;
    select(box.index, box.number);
    if (page.live) history.replaceState(history.state, "", `${location.pathname}${location.search}#box-${box.number}`);
    update();
  }
  document.addEventListener("click", (event) => {
    const element = event.target.closest("[data-box]");
    if (!element || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    selectBox(Number(element.dataset.box));
  });
  function selectClass(target, push = true) {
    select(target, null);
    if (push && page.live) {
      const url = page.pages[state.target] || `${modelUrl}/image/${page.image}/class/${state.target}`;
      history.pushState({ target: state.target }, "", url + location.search);
    }
    update();
  }

  document.getElementById("classes").addEventListener("click", (event) => {
    const link = event.target.closest("[data-class]");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    selectClass(link.dataset.class);
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
    const link = /^[1-9]$/.test(event.key) && findAll("#classes [data-class]")[Number(event.key) - 1];
    if (link) selectClass(link.dataset.class);
  });
  addEventListener("popstate", (event) => selectClass(event.state ? event.state.target : page.target, false));

  function repaint() {
    for (const stage of [main, comparison]) {
      const heatmap = state.heatmaps[stage.dataset.stage];
      if (heatmap && !stage.hidden) paintHeatmap(stage, heatmap);
    }
    if (state.heatmaps.main) drawScale(state.heatmaps.main);
  }
  function drawScale(heatmap) {
    const bar = document.getElementById("scale"), options = paintOptions(heatmap);
    const image = new ImageData(256, 1);
    for (let i = 0; i < 256; i++) image.data.set([...interpolateColor(options.colormap, i / 255), 255], 4 * i);
    bar.getContext("2d").putImageData(image, 0, 0);
    document.getElementById("scale-low").textContent = options.signed ? page.words.against : page.words.none;
    document.getElementById("scale-high").textContent = options.signed ? page.words.for : page.words.strongest;
  }

  // Settings that differ from the defaults are part of the address.
  const isDefault = (control) => control.value === (control.tagName === "SELECT" ? ([...control.options].find((o) => o.defaultSelected) || control.options[0]).value : control.defaultValue);
  function storeSettings() {
    const query = new URLSearchParams();
    for (const control of controls.elements) if (control.name && !isDefault(control)) query.set(control.name, control.value);
    if (page.live) history.replaceState(history.state, "", location.pathname + (query.size ? `?${query}` : "") + location.hash);
  }
  function restoreSettings() {
    for (const [name, value] of new URLSearchParams(location.search)) {
      const control = controls.elements[name];
      if (control && (control.tagName !== "SELECT" || [...control.options].some((o) => o.value === value))) control.value = value;
    }
  }
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.addEventListener("input", (event) => {
    storeSettings();
    if (["opacity", "colormap", "evidence"].includes(event.target.name)) {
      repaint();
      if (state.heatmaps.main) updateLinks(state.heatmaps.main);
    } else update();
  });
  new ResizeObserver(repaint).observe(find(".frame", main));

  // Search for a class by name or index.
  const form = document.getElementById("class-search");
  if (form) {
    const input = document.getElementById("class-query"), matches = document.getElementById("class-matches");
    const search = async () => (await fetchJson(`/api/models/${page.model}/classes?search=${encodeURIComponent(input.value)}`)).classes;
    input.addEventListener("input", async () => {
      if (input.value.trim()) matches.replaceChildren(...(await search()).map((c) => createElement("option", { value: c.name })));
    });
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const classes = await search();
      if (classes.length) selectClass(classes[0].index);
      else showStatus(`No class matches “${input.value}”.`);
    });
  }

  // Uploads: images that are chosen, dropped or pasted. The browser stores their keys for the strip.
  const MAX_FILES = 64, MAX_STORED = 24;
  const storedImages = () => { try { return JSON.parse(localStorage.getItem("images") || "[]"); } catch { return []; } };
  function addToStrip(entries) {
    const strip = document.getElementById("strip");
    for (const { key, name } of entries) {
      if (find(`[data-image="${CSS.escape(key)}"]`, strip)) continue;
      const image = createElement("img", { src: `/image/photo?image=${encodeURIComponent(key)}&max_size=160`, alt: name, width: 96, height: 64 });
      const link = createElement("a", { href: `${modelUrl}/image/${encodeURIComponent(key)}`, "data-image": key, title: name }, image);
      if (key === page.image) link.setAttribute("aria-current", "page");
      const item = createElement("li", {}, link);
      strip.append(item);
      const options = document.getElementById("comparison-images");
      if (options && key !== page.image) options.append(createElement("option", { value: `image:${key}` }, name));
      image.addEventListener("error", () => item.remove());  // the server has dropped the image
    }
  }
  async function upload(files) {
    const images = [...files].filter((file) => file.type.startsWith("image/") || file.type === "").slice(0, MAX_FILES);
    const uploaded = [];
    for (const [i, file] of images.entries()) {
      showStatus(images.length > 1 ? `Uploading image ${i + 1} of ${images.length}…` : "Uploading the image…");
      try {
        uploaded.push(await uploadImage(file));
      } catch (error) {
        showStatus(`${file.name}: ${error.message}`);
      }
    }
    if (!uploaded.length) return;
    const entries = [...uploaded.map(({ key, name }) => ({ key, name })), ...storedImages()];
    const distinct = entries.filter((a, i) => entries.findIndex((b) => b.key === a.key) === i).slice(0, MAX_STORED);
    try { localStorage.setItem("images", JSON.stringify(distinct)); } catch { /* unavailable in private windows */ }
    location.href = `${modelUrl}/image/${uploaded[0].key}`;
  }
  if (page.live) {
    addToStrip(storedImages());
    for (const id of ["files", "folder"]) document.getElementById(id).addEventListener("change", (event) => upload(event.target.files));
    addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
    addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
    addEventListener("drop", (event) => { event.preventDefault(); document.body.classList.remove("dropping"); upload(event.dataTransfer.files); });
    addEventListener("paste", (event) => { if (event.clipboardData.files.length) upload(event.clipboardData.files); });
  }

  restoreSettings();
  const fragment = location.hash.match(/^#box-(\d+)$/);
  if (fragment && page.boxes[fragment[1]]) selectBox(Number(fragment[1]));
  else update();
})();
