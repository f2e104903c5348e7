"use strict";
// Atlas page: a map of icons that can be zoomed and moved, and the details of the selected cell.
(() => {
  const [WIDTH, HEIGHT] = page.size, MAX_SCALE = 16, ZOOM_STEP = 1.4, CLICK_TOLERANCE = 5;
  const view = document.getElementById("view"), svg = document.getElementById("atlas");
  const links = findAll("a[data-cell]", svg);
  const zoomIn = document.getElementById("zoom-in"), zoomOut = document.getElementById("zoom-out"), zoomReset = document.getElementById("zoom-reset");
  let left = 0, top = 0, scale = 1, selected = null;

  // Size of the visible part in units of the map, in the proportions of the window. At scale 1 all of the map is visible.
  function visibleSize() {
    const ratio = svg.clientHeight / svg.clientWidth || 1;
    const width = Math.max(WIDTH, HEIGHT / ratio) / scale;
    return [width, width * ratio];
  }
  const clampStart = (start, length, total) => (length >= total ? (total - length) / 2 : Math.max(0, Math.min(total - length, start)));
  function draw() {
    const [width, height] = visibleSize();
    left = clampStart(left, width, WIDTH);
    top = clampStart(top, height, HEIGHT);
    svg.setAttribute("viewBox", [left, top, width, height].map((v) => v.toFixed(2)).join(" "));
    document.getElementById("zoom").textContent = `${scale.toFixed(1)} ×`;
    zoomOut.disabled = zoomReset.disabled = scale === 1;
    zoomIn.disabled = scale === MAX_SCALE;
    view.classList.toggle("zoomed", scale > 1);
    view.classList.toggle("named", svg.clientWidth / width >= 1);  // labels are 9 units high: show them from 9 pixels on
  }
  const toMap = (x, y) => {
    const box = svg.getBoundingClientRect(), [width, height] = visibleSize();
    return [left + (x - box.left) / box.width * width, top + (y - box.top) / box.height * height];
  };
  const visibleCenter = () => { const [width, height] = visibleSize(); return [left + width / 2, top + height / 2]; };
  // Zoom about a fixed point of the map.
  function zoom(factor, [x, y] = visibleCenter()) {
    const next = Math.max(1, Math.min(MAX_SCALE, scale * factor));
    left = x - (x - left) * scale / next;
    top = y - (y - top) * scale / next;
    scale = next;
    draw();
  }
  function move(dx, dy) {
    left += dx;
    top += dy;
    draw();
  }
  function reset() {
    scale = 1;
    draw();
  }

  zoomIn.addEventListener("click", () => zoom(ZOOM_STEP));
  zoomOut.addEventListener("click", () => zoom(1 / ZOOM_STEP));
  zoomReset.addEventListener("click", reset);
  view.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = visibleSize()[0] / 5;
    const action = {
      "+": () => zoom(ZOOM_STEP), "=": () => zoom(ZOOM_STEP), "-": () => zoom(1 / ZOOM_STEP), "0": reset,
      ArrowLeft: () => move(-step, 0), ArrowRight: () => move(step, 0), ArrowUp: () => move(0, -step), ArrowDown: () => move(0, step),
    }[event.key];
    if (!action || (scale === 1 && event.key.startsWith("Arrow"))) return;  // arrow keys scroll the page at scale 1
    event.preventDefault();
    action();
  });
  view.addEventListener("wheel", (event) => {
    if (event.ctrlKey === false && scale === 1 && event.deltaY > 0) return;  // scroll the page
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * (event.deltaMode === 1 ? 0.05 : 0.002)), toMap(event.clientX, event.clientY));
  }, { passive: false });

  // One pointer moves the map, two zoom it.
  const pointers = new Map();
  let travelled = 0;  // pixels since the first pointer went down
  const pinch = () => {
    const [a, b] = [...pointers.values()];
    return { distance: Math.hypot(a[0] - b[0], a[1] - b[1]), center: [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2] };
  };
  svg.addEventListener("pointerdown", (event) => {
    if (event.button > 0) return;
    if (pointers.size === 0) travelled = 0;
    pointers.set(event.pointerId, [event.clientX, event.clientY]);
  });
  addEventListener("pointermove", (event) => {
    const last = pointers.get(event.pointerId);
    if (!last || pointers.size > 2) return;
    const current = [event.clientX, event.clientY], unitsPerPixel = visibleSize()[0] / svg.clientWidth;
    if (pointers.size === 2) {
      const start = pinch(), fixed = toMap(...start.center);
      pointers.set(event.pointerId, current);
      const end = pinch();
      travelled = Infinity;
      zoom(end.distance / Math.max(1, start.distance), fixed);
      move((start.center[0] - end.center[0]) * unitsPerPixel, (start.center[1] - end.center[1]) * unitsPerPixel);
    } else {
      pointers.set(event.pointerId, current);
      travelled += Math.hypot(current[0] - last[0], current[1] - last[1]);
      move((last[0] - current[0]) * unitsPerPixel, (last[1] - current[1]) * unitsPerPixel);
    }
  });
  for (const kind of ["pointerup", "pointercancel"]) addEventListener(kind, (event) => pointers.delete(event.pointerId));
  svg.addEventListener("dragstart", (event) => event.preventDefault());
  svg.addEventListener("mousedown", (event) => event.preventDefault());  // a drag must not focus, and so select, a cell

  // Details of a cell: icon, classes and images.
  const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
  function showDetails(index) {
    if (selected === index) return;
    selected = index;
    links.forEach((link, i) => link.classList.toggle("selected", i === index));
    const cell = page.cells[index], sheet = page.sheet;
    const icon = createElement("svg", { class: "tile", viewBox: `${cell.x} ${cell.y} ${sheet.side} ${sheet.side}`, role: "img", "aria-label": "Pattern of the cell" },
      createElement("image", { href: sheet.src, width: sheet.width, height: sheet.height }));
    const parts = [icon, createElement("p", {}, createElement("strong", {}, plural(cell.count, "vector")), ` from ${plural(cell.num_images, "image")}; row ${cell.row + 1}, column ${cell.column + 1}`)];
    if (cell.classes.length) {
      const max = Math.max(...cell.classes.map((c) => c.effect), 1e-12);
      const items = cell.classes.map((c) => classItem(c, Math.max(0, c.effect / max)));
      parts.push(document.getElementById("effect-caption").content.cloneNode(true), createElement("ol", { class: "classes" }, ...items));
    }
    const heading = cell.num_images > cell.images.length ? "Images with the most vectors" : "Images";
    parts.push(createElement("h3", {}, heading), createElement("ul", { class: "sources" }, ...cell.images.map(imageItem)));
    document.getElementById("cell").replaceChildren(...parts);
  }
  function classItem({ name, effect, page: url }, fraction) {
    const value = `${effect < 0 ? "−" : "+"}${formatNumber(Math.abs(effect))}`;
    const link = createElement("a", {}, createElement("span", { class: "name" }, name), createElement("span", { class: "value" }, value), createMeter(fraction));
    if (url) link.href = url;
    return createElement("li", {}, link);
  }
  function imageItem({ name, count, src, page: url }) {
    const caption = createElement("span", { class: "soft" }, plural(count, "vector"));
    if (!src) return createElement("li", {}, createElement("span", {}, name), " ", caption);
    const image = createElement("img", { src, alt: name, width: 96, height: 72 });
    return createElement("li", {}, createElement("a", { href: url }, image, caption));
  }

  function scrollToCell(link) {
    const cell = page.cells[link.dataset.cell], [width, height] = visibleSize();
    const x = cell.left + page.cellSize[0] / 2, y = cell.top + page.cellSize[1] / 2;
    if (x < left || x > left + width) left = x - width / 2;
    if (y < top || y > top + height) top = y - height / 2;
    draw();
  }
  function selectCell(link) {
    showDetails(Number(link.dataset.cell));
    scrollToCell(link);
    history.replaceState(null, "", link.getAttribute("href"));
  }
  view.addEventListener("focusin", (event) => {  // on the view: an svg with this listener would be focusable itself
    const link = event.target.closest("a[data-cell]");
    if (link) selectCell(link);
  });
  svg.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-cell]");
    if (!link) return;
    event.preventDefault();
    if (travelled > CLICK_TOLERANCE) return;
    link.focus({ preventScroll: true });
    selectCell(link);
  });
  new ResizeObserver(draw).observe(view);
  const linked = links.find((link) => link.getAttribute("href") === location.hash);
  if (linked) {
    scale = 3;
    left = top = Infinity;
    scrollToCell(linked);
    showDetails(Number(linked.dataset.cell));
  }
  draw();
})();
