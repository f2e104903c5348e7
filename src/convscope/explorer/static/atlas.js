"use strict";
// The atlas: a map to be zoomed and moved, and what is known of a region of it.
(() => {
  const [WIDTH, HEIGHT] = page.size, NEAREST = 16, STEP = 1.4;
  const view = document.getElementById("view"), svg = document.getElementById("atlas");
  const places = findAll("a[data-cell]", svg);
  let left = 0, top = 0, scale = 1, chosen = null;

  // What is seen of the map: at 1 x all of it, in the window's own proportions.
  function seen() {
    const ratio = svg.clientHeight / svg.clientWidth || 1;
    const width = Math.max(WIDTH, HEIGHT / ratio) / scale;
    return [width, width * ratio];
  }
  const within = (start, length, all) => (length >= all ? (all - length) / 2 : Math.max(0, Math.min(all - length, start)));
  function draw() {
    const [width, height] = seen();
    left = within(left, width, WIDTH);
    top = within(top, height, HEIGHT);
    svg.setAttribute("viewBox", [left, top, width, height].map((v) => v.toFixed(2)).join(" "));
    document.getElementById("zoom").textContent = `${scale.toFixed(1)} ×`;
    document.getElementById("farther").disabled = document.getElementById("whole").disabled = scale === 1;
    document.getElementById("nearer").disabled = scale === NEAREST;
    view.classList.toggle("zoomed", scale > 1);
    view.classList.toggle("named", svg.clientWidth / width >= 1);  // pixels of a unit: names are 9 units high
  }
  // The point of the map under a point of the window.
  const under = (x, y) => {
    const box = svg.getBoundingClientRect(), [width, height] = seen();
    return [left + (x - box.left) / box.width * width, top + (y - box.top) / box.height * height];
  };
  const middle = () => [left + seen()[0] / 2, top + seen()[1] / 2];
  // Nearer or farther, so that the point of the map stays where it is.
  function zoom(factor, [x, y] = middle()) {
    const next = Math.max(1, Math.min(NEAREST, scale * factor));
    left = x - (x - left) * scale / next;
    top = y - (y - top) * scale / next;
    scale = next;
    draw();
  }
  function move(right, down) {
    left += right;
    top += down;
    draw();
  }
  function whole() {
    scale = 1;
    draw();
  }

  document.getElementById("nearer").addEventListener("click", () => zoom(STEP));
  document.getElementById("farther").addEventListener("click", () => zoom(1 / STEP));
  document.getElementById("whole").addEventListener("click", whole);
  view.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const far = seen()[0] / 5;
    const act = {
      "+": () => zoom(STEP), "=": () => zoom(STEP), "-": () => zoom(1 / STEP), "0": whole,
      ArrowLeft: () => move(-far, 0), ArrowRight: () => move(far, 0), ArrowUp: () => move(0, -far), ArrowDown: () => move(0, far),
    }[event.key];
    if (!act || (scale === 1 && event.key.startsWith("Arrow"))) return;  // the whole map moves with the page
    event.preventDefault();
    act();
  });
  view.addEventListener("wheel", (event) => {
    if (event.ctrlKey === false && scale === 1 && event.deltaY > 0) return;  // the page goes on
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * (event.deltaMode === 1 ? 0.05 : 0.002)), under(event.clientX, event.clientY));
  }, { passive: false });

  // One finger or the mouse moves the map, two fingers zoom it.
  const fingers = new Map();
  let travelled = 0;
  const spread = () => {
    const [a, b] = [...fingers.values()];
    return { far: Math.hypot(a[0] - b[0], a[1] - b[1]), at: [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2] };
  };
  svg.addEventListener("pointerdown", (event) => {
    if (event.button > 0) return;
    if (fingers.size === 0) travelled = 0;
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
  });
  addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before || fingers.size > 2) return;
    const now = [event.clientX, event.clientY], unit = seen()[0] / svg.clientWidth;
    if (fingers.size === 2) {
      const old = spread(), point = under(...old.at);
      fingers.set(event.pointerId, now);
      const is = spread();
      travelled = Infinity;
      zoom(is.far / Math.max(1, old.far), point);
      move((old.at[0] - is.at[0]) * unit, (old.at[1] - is.at[1]) * unit);
    } else {
      fingers.set(event.pointerId, now);
      travelled += Math.hypot(now[0] - before[0], now[1] - before[1]);
      move((before[0] - now[0]) * unit, (before[1] - now[1]) * unit);
    }
  });
  for (const end of ["pointerup", "pointercancel"]) addEventListener(end, (event) => fingers.delete(event.pointerId));
  svg.addEventListener("dragstart", (event) => event.preventDefault());
  svg.addEventListener("mousedown", (event) => event.preventDefault());  // a drag must not choose a region

  // A region: its icon, its classes, its pictures.
  function show(index) {
    if (chosen === index) return;
    chosen = index;
    places.forEach((place, i) => place.classList.toggle("chosen", i === index));
    const cell = page.cells[index], sheet = page.sheet;
    const icon = make("svg", { class: "tile", viewBox: `${cell.x} ${cell.y} ${sheet.side} ${sheet.side}`, role: "img", "aria-label": "Pattern of the region" },
      make("image", { href: sheet.src, width: sheet.width, height: sheet.height }));
    const parts = [icon, make("p", {}, make("strong", {}, `${cell.count} ${cell.count === 1 ? "vector" : "vectors"}`), ` from ${cell.sources} ${cell.sources === 1 ? "picture" : "pictures"}; row ${cell.row + 1}, column ${cell.column + 1}`)];
    if (cell.classes.length) parts.push(document.getElementById("words").content.cloneNode(true), make("ol", { class: "classes" }, ...cell.classes.map(said)));
    parts.push(make("h3", {}, cell.sources > cell.pictures.length ? "Pictures with most of them" : "Pictures"), make("ul", { class: "sources" }, ...cell.pictures.map(source)));
    document.getElementById("cell").replaceChildren(...parts);
  }
  function said(one) {
    const most = Math.max(...page.cells[chosen].classes.map((c) => c.effect), 1e-12), width = 100 * Math.max(0, one.effect / most);
    const meter = make("svg", { class: "meter", viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true" },
      make("rect", { class: "track", width: 100, height: 6 }), make("rect", { class: "fill", width, height: 6 }));
    const link = make("a", {}, make("span", { class: "name" }, one.name), make("span", { class: "share" }, `${one.effect < 0 ? "−" : "+"}${short(Math.abs(one.effect))}`), meter);
    if (one.page) link.href = one.page;
    return make("li", {}, link);
  }
  function source(one) {
    const much = make("span", { class: "soft" }, `${one.vectors} of them`);
    if (!one.src) return make("li", {}, make("span", {}, one.name), " ", much);
    const image = make("img", { src: one.src, alt: one.name, width: 96, height: 72 });
    return make("li", {}, make("a", { href: one.page }, image, much));
  }
  const centre = (place) => {
    const cell = page.cells[place.dataset.cell];
    return [cell.left + page.cell[0] / 2, cell.top + page.cell[1] / 2];
  };
  // Brings a region into view.
  function closer(place) {
    const [x, y] = centre(place), [width, height] = seen();
    if (x < left || x > left + width) left = x - width / 2;
    if (y < top || y > top + height) top = y - height / 2;
    draw();
  }
  function choose(place) {
    show(Number(place.dataset.cell));
    closer(place);
    history.replaceState(null, "", place.getAttribute("href"));
  }
  view.addEventListener("focusin", (event) => {  // an svg with such a listener would take the focus itself
    const place = event.target.closest("a[data-cell]");
    if (place) choose(place);
  });
  svg.addEventListener("click", (event) => {
    const place = event.target.closest("a[data-cell]");
    if (!place) return;
    event.preventDefault();
    if (travelled > 5) return;
    place.focus({ preventScroll: true });
    choose(place);
  });
  new ResizeObserver(draw).observe(view);
  const linked = places.find((place) => place.getAttribute("href") === location.hash);
  if (linked) {
    scale = 3;
    left = top = Infinity;
    closer(linked);
    show(Number(linked.dataset.cell));
  }
  draw();
})();
