"use strict";
const find = (id) => document.getElementById(id);
const about = JSON.parse(find("about").textContent);
const LARGEST = 1600; // pixels of a side that are kept of a photo, to show it

// --- The worker ---

function bytesOf(id) {
  const text = find(id).textContent.trim();
  const bytes = new Uint8Array(Math.floor((text.length * 3) / 4) - (text.match(/=*$/)[0].length));
  const step = 1 << 20;
  for (let from = 0, at = 0; from < text.length; from += step) {
    const part = atob(text.slice(from, from + step));
    for (let i = 0; i < part.length; i++) bytes[at++] = part.charCodeAt(i);
  }
  return bytes;
}

const worker = new Worker(URL.createObjectURL(new Blob([find("worker").textContent], { type: "text/javascript" })));
const waiting = new Map();
let asked = 0;
function ask(message, transfer = []) {
  return new Promise((resolve, reject) => {
    waiting.set(++asked, { resolve, reject });
    worker.postMessage({ id: asked, ...message }, transfer);
  });
}
worker.onmessage = ({ data: { id, result, error } }) => {
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  error === undefined ? resolve(result) : reject(new Error(error));
};
worker.onerror = (event) => {
  say(`The detector does not run in this browser: ${event.message || "it is too old"}.`, true);
};

// --- What is shown ---

const say = (text, wrong = false) => {
  find("status").textContent = text;
  find("status").classList.toggle("wrong", wrong);
};
const objects = (count) => `${count} object${count === 1 ? "" : "s"}`;
const hue = (classId) => (classId * 137) % 360;
const limitOf = (classId) =>
  find("calibrated").checked ? about.score_thresholds[classId] : Number(find("threshold").value);
// As in ssd.calibration: with calibrated thresholds, scores are probabilities where the model has them.
const worth = (score) => {
  if (!find("calibrated").checked || !about.calibration) return score;
  const p = Math.min(Math.max(score, 1e-6), 1 - 1e-6);
  return 1 / (1 + Math.exp(-(Math.log(p / (1 - p)) / about.calibration.temperature + about.calibration.bias)));
};
const kept = (found) =>
  found.detections.filter((each) => each.score > limitOf(each.class_id)).map((each) => ({ ...each, score: worth(each.score) }));

// A figure with a canvas and a list; `show(image, found)` fills it, `show()` draws it anew.
function figure(name, onRemove) {
  const home = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const title = document.createElement("span");
  const remove = document.createElement("button");
  const canvas = document.createElement("canvas");
  const list = document.createElement("ol");
  remove.type = "button";
  remove.textContent = "Remove";
  remove.setAttribute("aria-label", `Remove ${name}`);
  canvas.setAttribute("role", "img");
  title.textContent = `${name} …`;
  caption.append(title, remove);
  home.append(caption, canvas, list);
  find("results").prepend(home);
  let image = null, found = null;
  const show = (newImage = image, newFound = found) => {
    [image, found] = [newImage, newFound];
    if (!found) return;
    const some = kept(found);
    title.textContent = `${name}: ${objects(some.length)}`;
    canvas.setAttribute("aria-label", `${name} with boxes around ${objects(some.length)}, listed below`);
    home.dataset.found = JSON.stringify(found);
    draw(canvas, image, found, some);
    list.replaceChildren(...some.map((each) => {
      const item = document.createElement("li");
      item.textContent = `${each.name} ${each.score.toFixed(2)}`;
      item.style.setProperty("--color", `hsl(${hue(each.class_id)} 75% 45%)`);
      return item;
    }));
  };
  const figureOf = { show, fail: (text) => {
    title.textContent = `${name}: ${text}`;
    title.classList.add("wrong");
    home.dataset.error = text;
    canvas.remove();
  } };
  const sizes = new ResizeObserver(() => show());
  sizes.observe(canvas);
  remove.onclick = () => {
    sizes.disconnect();
    figures.delete(figureOf);
    home.remove();
    onRemove?.();
    find("photos").focus();
  };
  figures.add(figureOf);
  return figureOf;
}
const figures = new Set();

function draw(canvas, image, found, some) {
  // As many pixels as the screen has for it, so that labels are of one size whatever the photo's.
  const ratio = window.devicePixelRatio || 1;
  const shown = Math.min(canvas.clientWidth || 600, (window.innerHeight * 0.8 * found.width) / found.height);
  canvas.width = Math.max(1, Math.round(shown * ratio));
  canvas.height = Math.max(1, Math.round((canvas.width * found.height) / found.width));
  const pencil = canvas.getContext("2d");
  pencil.imageSmoothingQuality = "high";
  pencil.drawImage(image, 0, 0, canvas.width, canvas.height);
  const scale = canvas.width / found.width, line = 2.5 * ratio, text = 14 * ratio;
  pencil.font = `600 ${text}px system-ui, sans-serif`;
  pencil.textBaseline = "middle";
  const boxes = some.map((each) => each.box.map((side) => side * scale));
  for (const [i, [left, top, right, bottom]] of [...boxes.entries()].reverse())
    for (const [color, width] of [["#0008", line + 2 * ratio], [`hsl(${hue(some[i].class_id)} 90% 60%)`, line]]) {
      pencil.strokeStyle = color;
      pencil.lineWidth = width;
      pencil.strokeRect(left, top, right - left, bottom - top);
    }
  // The best choose their places first: above, below, at the top inside, or over what is there.
  const taken = [];
  const labels = boxes.map(([left, top, , bottom], i) => {
    const label = `${some[i].name} ${some[i].score.toFixed(2)}`;
    const width = pencil.measureText(label).width + text * 0.8, height = text * 1.5;
    const x = Math.max(0, Math.min(left - line / 2, canvas.width - width));
    const places = [top - height, bottom, top].filter((y) => y >= 0 && y + height <= canvas.height);
    const free = (y) => taken.every((each) => x + width <= each.x || each.x + each.width <= x ||
      y + height <= each.y || each.y + height <= y);
    const place = { label, x, y: places.find(free) ?? Math.max(0, top - height), width, height };
    taken.push(place);
    return place;
  });
  for (const [i, { label, x, y, width, height }] of [...labels.entries()].reverse()) {
    pencil.fillStyle = `hsl(${hue(some[i].class_id)} 75% 28%)`;
    pencil.fillRect(x, y, width, height);
    pencil.fillStyle = "#fff";
    pencil.fillText(label, x + text * 0.4, y + height / 2);
  }
}

// --- Photos ---

async function preview(file) {
  const whole = await createImageBitmap(file, { imageOrientation: "from-image" });
  const part = LARGEST / Math.max(whole.width, whole.height);
  if (part >= 1) return whole;
  const small = document.createElement("canvas");
  small.width = Math.max(1, Math.round(whole.width * part));
  small.height = Math.max(1, Math.round(whole.height * part));
  const pencil = small.getContext("2d");
  pencil.imageSmoothingQuality = "high";
  pencil.drawImage(whole, 0, 0, small.width, small.height);
  whole.close();
  return small;
}

async function add(files) {
  const photos = [...files];
  for (const [number, file] of photos.entries()) {
    const place = figure(file.name || "photo");
    say(`Looking at ${file.name || "photo"} (${number + 1} of ${photos.length}) …`);
    try {
      await ready;
      const found = await ask({ image: file });
      place.show(await preview(file), found);
      say(`${file.name || "photo"}: ${objects(kept(found).length)}, ${found.milliseconds.toFixed(0)} ms in the network.`);
    } catch (error) {
      place.fail(error.message);
      say(`${file.name || "photo"}: ${error.message}.`, true);
    }
  }
}

find("photos").onchange = ({ target }) => {
  add(target.files);
  target.value = ""; // so that the same one can be chosen again
};
addEventListener("paste", ({ clipboardData }) => add(clipboardData.files));
addEventListener("dragover", (event) => {
  event.preventDefault();
  find("drop").classList.add("over");
});
addEventListener("dragleave", () => find("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  find("drop").classList.remove("over");
  add(event.dataTransfer.files);
});

// --- Camera ---

let film = null;
async function openCamera() {
  if (!navigator.mediaDevices) {
    say("This browser gives the camera only to pages from https or localhost.", true);
    return;
  }
  const own = film = {};  // film is another, or none, once this camera is closed
  find("camera").setAttribute("aria-pressed", "true");
  try {
    own.stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" }, audio: false });
    const video = document.createElement("video");
    video.muted = video.playsInline = true;
    video.srcObject = own.stream;
    await video.play();
    await ready;
    let place = null;
    while (film === own) {
      const frame = await createImageBitmap(video);
      const copy = await createImageBitmap(frame);
      const found = await ask({ image: copy }, [copy]);
      if (film !== own) break;
      if (!place) say("The camera is open.");
      place ??= figure("Camera", closeCamera);
      place.show(frame, found);
      await new Promise(requestAnimationFrame);
    }
  } catch (error) {
    if (film === own) {
      closeCamera();
      say(`Camera: ${error.message || error.name}.`, true);
    }
  }
  own.stream?.getTracks().forEach((track) => track.stop());
}
function closeCamera() {
  film?.stream?.getTracks().forEach((track) => track.stop());
  film = null;
  find("camera").setAttribute("aria-pressed", "false");
  say("The camera is closed.");
}
find("camera").onclick = () => (film ? closeCamera() : openCamera());

// --- Settings, proof, start ---

const slider = find("threshold");
slider.min = about.nms.score_threshold;
slider.value = 0.4;
const redraw = () => {
  slider.disabled = find("calibrated").checked;
  find("shown").textContent = slider.disabled ? "each" : Number(slider.value).toFixed(2);
  figures.forEach((each) => each.show());
};
slider.oninput = find("calibrated").onchange = redraw;
find("each").hidden = !about.score_thresholds.length;
redraw();

find("check").onclick = async () => {
  const proof = find("proof");
  proof.textContent = "Looking at a picture of which the result is known …";
  try {
    const { width, height, detections } = await ask({ image: new Blob([bytesOf("picture")], { type: "image/png" }) });
    const sides = [width, height, width, height], limit = about.check.tolerance;
    const apart = (each, others) => Math.min(1, ...others.filter((other) => other.class_id === each.class_id)
      .map((other) => Math.max(Math.abs(each.score - other.score),
        ...each.box.map((side, k) => Math.abs(side - other.box[k]) / sides[k]))));
    let wrong = 0, worst = 0;
    for (const [some, others] of [[about.check.detections, detections], [detections, about.check.detections]])
      for (const each of some) {
        const nearest = apart(each, others);
        if (nearest <= limit) worst = Math.max(worst, nearest);
        else if (each.score > about.nms.score_threshold + 2 * limit) wrong++;
      }
    const failed = wrong > about.check.unlike;
    proof.textContent = `${failed ? `NOT PROVED: ${wrong} differ` : "Proved"}; ${about.check.detections.length} expected, ` +
      `${detections.length} found, largest difference ${worst.toExponential(1)} (allowed ${limit}).`;
    proof.classList.toggle("wrong", failed);
    proof.dataset.wrong = wrong;
  } catch (error) {
    proof.textContent = `NOT PROVED: ${error.message}.`;
    proof.classList.add("wrong");
  }
};

find("classes").textContent = about.class_names.length > 12
  ? `Finds ${about.class_names.length} kinds: ${about.class_names.slice(0, 12).join(", ")} …`
  : `Finds: ${about.class_names.join(", ")}`;
find("made").textContent = `Made by ssd300 ${about.check.ssd300} in ${about.precision}; runs in ONNX Runtime Web.`;

const given = { about, wasm: bytesOf("wasm"), model: bytesOf("model") };
const ready = ask({ given }, [given.wasm.buffer, given.model.buffer]);
ready.then(
  () => {
    for (const id of ["wasm", "model", "worker"]) find(id).remove(); // their memory
    find("check").disabled = false;
    say("Ready.");
  },
  (error) => say(`The detector does not start: ${error.message}.`, true),
);
