// Behind the page: the network, and what an image goes through before it. After the runtime, which made `ort`.
{
  const BAND = 1000000; // pixels that are read and resized at a time
  const MAX_ASPECT = 100;
  let session, about;

  const unpacked = (bytes) =>
    new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();

  async function start(given) {
    about = given.about;
    ort.env.wasm.numThreads = 1; // more need headers that a file does not have
    ort.env.wasm.wasmBinary = await unpacked(given.wasm);
    const model = new Uint8Array(await unpacked(given.model));
    session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
  }

  async function detect(source) {
    // As the detector reads photos: upright by EXIF, and no colour profile.
    const options = { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" };
    let image = source;
    if (source instanceof Blob) {
      try {
        image = await createImageBitmap(source, options);
      } catch {
        throw new Error("this browser cannot read it as an image");
      }
    }
    const { width, height } = image;
    if (Math.max(width, height) > MAX_ASPECT * Math.min(width, height))
      throw new Error(`${width}x${height} is too thin to be seen in a square`);
    const size = about.size;
    const input = new ort.Tensor("uint8", resized(image, size), [1, size, size, 3]);
    const begun = performance.now();
    const { boxes, scores, class_ids, counts } = await session.run({ images: input });
    const milliseconds = performance.now() - begun;
    image.close();
    if (scores.data.some(Number.isNaN)) throw new Error("the network gave no finite numbers");
    const sides = [width, height, width, height];
    const detections = [];
    for (let i = 0; i < Number(counts.data[0]); i++) {
      const box = sides.map((side, k) =>
        Math.min(Math.max(Math.fround(boxes.data[4 * i + k] * side), 0), side));
      const class_id = Number(class_ids.data[i]);
      if (box[0] < box[2] && box[1] < box[3])
        detections.push({ name: about.class_names[class_id], class_id, score: scores.data[i], box });
    }
    return { width, height, detections, milliseconds };
  }

  // The whole image squashed to uint8 [size, size, 3], bilinear and antialiased: to the bit as torch does it,
  // with which the network was proved; browsers resize in ways of their own.
  function resized(image, size) {
    const { width, height } = image;
    const rows = Math.max(1, Math.floor(BAND / width));
    const canvas = new OffscreenCanvas(width, Math.min(rows, height));
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const across = filters(width, size);
    const narrow = new Uint8Array(height * size * 3);
    for (let top = 0; top < height; top += rows) {
      context.fillStyle = "white"; // under what is transparent
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.drawImage(image, 0, -top);
      const count = Math.min(rows, height - top);
      const { data } = context.getImageData(0, 0, width, count);
      for (let y = 0; y < count; y++)
        for (let x = 0; x < size; x++)
          weigh(data, 4 * (y * width + across.first[x]), 4, across.weights[x], across.bits,
            narrow, 3 * ((top + y) * size + x));
    }
    const down = filters(height, size);
    const made = new Uint8Array(size * size * 3);
    for (let y = 0; y < size; y++)
      for (let x = 0; x < size; x++)
        weigh(narrow, 3 * (down.first[y] * size + x), 3 * size, down.weights[y], down.bits, made, 3 * (y * size + x));
    return made;
  }

  function weigh(from, at, step, weights, bits, to, place) {
    let red = 0, green = 0, blue = 0;
    for (let k = 0; k < weights.length; k++, at += step) {
      red += from[at] * weights[k];
      green += from[at + 1] * weights[k];
      blue += from[at + 2] * weights[k];
    }
    const half = (1 << bits) >> 1;
    to[place] = Math.min((red + half) >> bits, 255);
    to[place + 1] = Math.min((green + half) >> bits, 255);
    to[place + 2] = Math.min((blue + half) >> bits, 255);
  }

  // Of each output pixel a triangle of weights, in as many bits as 16 hold; see `squash` in detect.py.
  function filters(length, size) {
    const scale = length / size, reach = Math.max(scale, 1);
    const first = [], shares = [];
    let most = 0;
    for (let i = 0; i < size; i++) {
      const middle = scale * (i + 0.5);
      const from = Math.max(Math.trunc(middle - reach + 0.5), 0);
      const to = Math.min(Math.trunc(middle + reach + 0.5), length);
      const raw = Array.from({ length: to - from }, (_, k) =>
        Math.max(1 - Math.abs((from + k - middle + 0.5) / reach), 0));
      const sum = raw.reduce((a, b) => a + b, 0);
      first.push(from);
      shares.push(raw.map((each) => each / sum));
      most = Math.max(most, ...shares[i]);
    }
    let bits = 0;
    while (bits < 22 && Math.trunc(0.5 + most * 2 ** (bits + 1)) < 1 << 15) bits++;
    return { first, bits, weights: shares.map((row) => Int32Array.from(row, (each) => 0.5 + each * 2 ** bits)) };
  }

  let last = Promise.resolve(); // one after another, as they come
  self.onmessage = ({ data }) => {
    last = last.then(async () => {
      try {
        postMessage({ id: data.id, result: await (data.given ? start(data.given) : detect(data.image)) });
      } catch (error) {
        postMessage({ id: data.id, error: error?.message || String(error) });
      }
    });
  };
}
