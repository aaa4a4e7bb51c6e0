"use strict";
(() => {
  const stage = document.getElementById("map");
  if (!stage) return;
  const data = JSON.parse(document.getElementById("map-data").textContent);
  const canvas = stage.querySelector("canvas.points"), tip = stage.querySelector(".tip");
  const thumb = tip.querySelector("canvas"), said = document.getElementById("map-said");
  const sprite = document.getElementById("map-sprite"), find = document.getElementById("map-find");
  const legend = [...document.querySelectorAll("#map-legend button[data-group]")];
  const tabs = [...document.querySelectorAll("#map-methods button")];
  const hidden = new Set(), count = data.names.length, margin = 14;
  // The last group, which may be all classes without a colour, lies below the others.
  const last = data.colours.length - 1, below = data.group.map(group => group === last ? 0 : 1);
  const order = data.names.map((_, i) => i).sort((one, other) => below[one] - below[other]);
  let method = 0, current = -1, sought = -1, width = 0, height = 0;

  const visible = i => data.maps[method][i] !== null && !hidden.has(data.group[i]) &&
    (sought < 0 || data.class[i] === sought);
  const spans = data.maps.map(points => [0, 1].map(axis => {
    const values = points.filter(point => point !== null).map(point => point[axis]);
    return Math.max(1, Math.max(...values) - Math.min(...values));
  }));
  const place = i => {
    const [x, y] = data.maps[method][i], [wide, high] = spans[method];
    const scale = Math.min((width - 2 * margin) / wide, (height - 2 * margin) / high);
    return [width / 2 + (x - 500) * scale, height / 2 - (y - 500) * scale];
  };
  const shape = (pen, kind, x, y, r) => {
    pen.beginPath();
    if (kind === 1) pen.rect(x - 0.88 * r, y - 0.88 * r, 1.76 * r, 1.76 * r);
    else if (kind === 2) { pen.moveTo(x, y - 1.25 * r); pen.lineTo(x + 1.1 * r, y + 0.8 * r); pen.lineTo(x - 1.1 * r, y + 0.8 * r); pen.closePath(); }
    else pen.arc(x, y, r, 0, 2 * Math.PI);
  };
  function draw() {
    const ratio = window.devicePixelRatio || 1, pen = canvas.getContext("2d");
    width = canvas.clientWidth; height = canvas.clientHeight;
    canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
    pen.scale(ratio, ratio);
    const radius = count > 1000 ? 2.6 : count > 200 ? 3.4 : 4.5;
    pen.globalAlpha = 0.85;
    for (const i of order) {
      if (!visible(i)) continue;
      const [x, y] = place(i);
      pen.fillStyle = data.colours[data.group[i]];
      shape(pen, data.group[i] % 3, x, y, radius);
      pen.fill();
    }
    if (current >= 0 && visible(current)) {
      const [x, y] = place(current);
      pen.globalAlpha = 1; pen.lineWidth = 2.5;
      pen.strokeStyle = getComputedStyle(stage).color;
      pen.beginPath(); pen.arc(x, y, radius + 4, 0, 2 * Math.PI); pen.stroke();
    }
  }
  function show(i) {
    current = i;
    if (i < 0) { tip.hidden = true; draw(); return; }
    const pen = thumb.getContext("2d"), side = data.side;
    thumb.width = thumb.height = side;
    pen.drawImage(sprite, (i % data.columns) * data.tile, Math.floor(i / data.columns) * data.tile, side, side, 0, 0, side, side);
    tip.querySelector("b").textContent = data.labelled ? data.classes[data.class[i]] : "";
    tip.querySelector("span").textContent = data.names[i];
    said.textContent = (data.labelled ? data.classes[data.class[i]] + ", " : "") + data.names[i];
    tip.hidden = false;
    draw();
    const [x, y] = place(i), left = x + 16 + tip.offsetWidth > width ? x - 16 - tip.offsetWidth : x + 16;
    tip.style.left = Math.max(0, Math.min(left, width - tip.offsetWidth)) + "px";
    tip.style.top = Math.max(0, Math.min(y - tip.offsetHeight / 2, height - tip.offsetHeight)) + "px";
  }
  function nearest(x, y, reach, fits) {
    let best = -1, least = reach * reach;
    for (let i = 0; i < count; i++) {
      if (!visible(i) || (fits && !fits(i))) continue;
      const [u, v] = place(i), far = (u - x) ** 2 + (v - y) ** 2;
      if (far < least) { least = far; best = i; }
    }
    return best;
  }
  const pointed = event => {
    const box = canvas.getBoundingClientRect();
    const found = nearest(event.clientX - box.left, event.clientY - box.top, event.pointerType === "touch" ? 32 : 18);
    if (found !== current) show(found);
  };
  canvas.addEventListener("pointermove", pointed);
  canvas.addEventListener("pointerdown", pointed);
  canvas.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") show(-1); });
  const ways = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.addEventListener("keydown", event => {
    if (event.key === "Escape") { show(-1); return; }
    const way = ways[event.key];
    if (!way) return;
    event.preventDefault();
    if (current < 0 || !visible(current)) { show(nearest(width / 2, height / 2, Infinity)); return; }
    const [x, y] = place(current);
    const found = nearest(x, y, Infinity, i => {
      const [u, v] = place(i), along = (u - x) * way[0] + (v - y) * way[1];
      return i !== current && along > 0 && along >= Math.abs((u - x) * way[1]) + Math.abs((v - y) * way[0]);
    });
    if (found >= 0) show(found);
  });
  const toggled = () => {
    legend.forEach(button => button.setAttribute("aria-pressed", String(!hidden.has(Number(button.dataset.group)))));
    show(-1);
  };
  legend.forEach(button => button.addEventListener("click", () => {
    const group = Number(button.dataset.group);
    if (!hidden.delete(group)) hidden.add(group);
    toggled();
  }));
  const all = document.getElementById("map-all");
  if (all) all.addEventListener("click", () => {
    if (hidden.size) hidden.clear();
    else legend.forEach(button => hidden.add(Number(button.dataset.group)));
    toggled();
  });
  if (find) find.addEventListener("change", () => { sought = Number(find.value); show(-1); });
  tabs.forEach((tab, number) => tab.addEventListener("click", () => {
    method = number;
    tabs.forEach(other => other.setAttribute("aria-pressed", String(other === tab)));
    document.querySelectorAll("#map-meanings > *").forEach((text, index) => { text.hidden = index !== number; });
    show(-1);
  }));
  new ResizeObserver(() => show(-1)).observe(canvas);
  draw();
})();
