// The player of the Motion tab: a moment of a take on one canvas, its time line on another, and
// what fingers and keys do to both. It knows no server and no wishes.
//
// A take is {told, frames, level}: what the server said about it, its poses so far, its floor.
function MotionPlayer(root) { // eslint-disable-line no-unused-vars
  const part = (name) => root.querySelector(`.bm-${name}`);
  const [canvas, bar] = [part("canvas"), part("time")];
  const [paper, lines] = [canvas.getContext("2d"), bar.getContext("2d")];
  const HOME = { yaw: 0.6, pitch: 0.2, distance: 4 };

  let take = null;
  let camera = { ...HOME, target: [0, 0.9, 0] };
  let at = 0; // the moment that is shown, in frames
  let playing = false;
  let grows = false; // more poses will come
  let mode = null; // what is chosen on the time line: "span", "on" (all after a moment) or nothing
  let picked = [0, 0]; // the span, in frames; only its start counts for "on"
  let step = 1; // frames that can only be chosen together
  let told_pick = () => {}; // told of every new choice
  let stale = true; // whether something must be painted

  // ---- painting -------------------------------------------------------------------------

  const size = () => (take ? take.told.body.height : 1.7);
  const is_dark = () => Boolean(root.closest(".dark"));

  function fit(sheet, pen) {
    const sharp = Math.min(window.devicePixelRatio || 1, 2);
    const [width, height] = [sheet.clientWidth, sheet.clientHeight];
    const [across, down] = [Math.round(width * sharp), Math.round(height * sharp)];
    if (sheet.width !== across) sheet.width = across;
    if (sheet.height !== down) sheet.height = down;
    pen.setTransform(sharp, 0, 0, sharp, 0, 0);
    return [width, height];
  }

  function follow(seconds) {
    const [x, , z] = MotionView.about(take.frames, at, 0.5 * take.told.fps);
    const wanted = [x, take.level + 0.5 * size(), z];
    const way = MotionView.add(wanted, camera.target, -1);
    const is_far = Math.hypot(...way) > 1.2 * size();
    const share = is_far || !playing ? 1 : 1 - Math.exp(-7 * seconds);
    camera.target = MotionView.add(camera.target, way, share);
  }

  function paint(seconds) {
    const look = MotionPaint.palette(is_dark());
    if (take && take.frames.count) {
      follow(seconds);
      const lens = MotionView.aim(camera, ...fit(canvas, paper));
      const { frames, level, told } = take;
      MotionPaint.scene(paper, lens, { frames, level, at, body: told.body }, look);
      root.dataset.shown = at.toFixed(2);
      root.dataset.frames = frames.count;
    }
    const [width] = fit(bar, lines);
    if (!take) { lines.clearRect(0, 0, width, 64); return; }
    const state = { fps: take.told.fps, total: take.told.frames, count: take.frames.count, at,
                    parts: take.told.parts, picked: mode === "span" ? picked : null,
                    cut: mode === "on" ? picked[0] : null };
    MotionPaint.timeline(lines, width, state, look, getComputedStyle(root).fontFamily);
    part("clock").textContent =
      `${(at / take.told.fps).toFixed(1)} of ${(take.told.frames / take.told.fps).toFixed(1)} s`;
    bar.setAttribute("aria-valuemax", take.told.frames - 1);
    bar.setAttribute("aria-valuenow", Math.round(at));
    bar.setAttribute("aria-valuetext", part("clock").textContent);
  }

  let last = 0;
  function tick(now) {
    const seconds = Math.min((now - last) / 1000, 0.1);
    last = now;
    if (canvas.clientWidth && (playing || stale)) {
      stale = false;
      if (playing && take) {
        const state = { fps: take.told.fps, speed: Number(part("speed").value),
                        count: take.frames.count, grows,
                        loops: part("loop").getAttribute("aria-pressed") === "true" };
        const moved = MotionView.next(at, seconds, state);
        at = moved.at;
        if (moved.over) play(false);
      }
      paint(seconds);
    }
    requestAnimationFrame(tick);
  }

  function play(is) {
    playing = is;
    part("play").textContent = is ? "❚❚" : "▶";
    part("play").setAttribute("aria-label", is ? "Pause" : "Play");
    stale = true;
  }

  function seek(frame) {
    if (!take) return;
    at = MotionView.clamp(frame, 0, Math.max(0, take.frames.count - 1));
    stale = true;
  }

  // ---- what fingers do ------------------------------------------------------------------

  const fingers = new Map();
  canvas.onpointerdown = (event) => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
    canvas.focus();
  };
  canvas.onpointermove = (event) => {
    const old = fingers.get(event.pointerId);
    if (!old) return;
    const now = [event.clientX, event.clientY];
    const other = [...fingers].find(([id]) => id !== event.pointerId);
    if (other) { // two fingers: nearer or farther
      const gap = (one) => Math.hypot(one[0] - other[1][0], one[1] - other[1][1]) + 1;
      camera = MotionView.zoom(camera, gap(old) / gap(now), size());
    } else camera = MotionView.orbit(camera, now[0] - old[0], now[1] - old[1]);
    fingers.set(event.pointerId, now);
    stale = true;
  };
  canvas.onpointerup = canvas.onpointercancel = (event) => fingers.delete(event.pointerId);
  canvas.addEventListener("wheel", (event) => { // a page must scroll past: only when it was touched
    if (!event.ctrlKey && document.activeElement !== canvas) return;
    event.preventDefault();
    camera = MotionView.zoom(camera, Math.exp(0.0012 * event.deltaY), size());
    stale = true;
  }, { passive: false });
  canvas.onkeydown = (event) => {
    const turns = { ArrowLeft: [-12, 0], ArrowRight: [12, 0], ArrowUp: [0, 12],
                    ArrowDown: [0, -12] };
    if (!(event.key in turns)) return;
    event.preventDefault();
    camera = MotionView.orbit(camera, ...turns[event.key]);
    stale = true;
  };
  const nearer = (factor) => { camera = MotionView.zoom(camera, factor, size()); stale = true; };
  const home = () => { camera = { ...camera, ...HOME, distance: 2.4 * size() }; stale = true; };
  canvas.ondblclick = home;

  let held = null; // what a finger on the time line moves: "at", 0 or 1 (an end of the span)
  function touch(event) {
    const box = bar.getBoundingClientRect();
    const frame = ((event.clientX - box.left) / box.width) * take.told.frames;
    if (held === "at") seek(frame);
    else pick(...(held === 0 ? [frame, picked[1]] : [picked[0], frame]));
  }
  bar.onpointerdown = (event) => {
    if (!take) return;
    bar.setPointerCapture(event.pointerId);
    const box = bar.getBoundingClientRect();
    const grips = mode === "span" ? picked : mode === "on" ? [picked[0]] : [];
    const away = grips.map((frame) =>
      Math.abs((frame / take.told.frames) * box.width - (event.clientX - box.left)));
    const nearest = away.indexOf(Math.min(...away));
    held = nearest >= 0 && away[nearest] < 14 ? nearest : "at";
    if (held === "at") play(false);
    touch(event);
  };
  bar.onpointermove = (event) => held !== null && take && touch(event);
  bar.onpointerup = bar.onpointercancel = () => { held = null; };
  bar.onkeydown = (event) => {
    const step = event.shiftKey ? 20 : 1;
    const ways = { ArrowLeft: at - step, ArrowRight: at + step, Home: 0, End: Infinity };
    if (event.key === " ") play(!playing);
    else if (event.key in ways && take) { play(false); seek(ways[event.key]); }
    else return;
    event.preventDefault();
  };

  // ---- choosing on the time line --------------------------------------------------------

  function pick(from, to) {
    const count = take.frames.count;
    picked = MotionView.snap(from, to, step, count);
    if (mode === "on") {
      const most = Math.floor(count / step) * step;
      picked[0] = MotionView.clamp(Math.round(from / step) * step, step, Math.max(step, most));
    }
    told_pick(picked.map((frame) => frame / take.told.fps));
    stale = true;
  }

  // Starts choosing: "span", "on", or null for nothing; `steps` frames go together.
  function choose(what, steps = 1) {
    [mode, step] = [what, steps];
    stale = true;
    if (!mode || !take) return;
    const count = take.frames.count;
    const from = Math.min(at, mode === "on" ? count : 0.6 * count);
    pick(from, mode === "on" ? count : from + Math.max(step, 0.3 * count));
  }

  // ---- what it shows --------------------------------------------------------------------

  // Shows another take from a frame on, or nothing; the camera stays where it was turned to.
  function show(one, frame = 0) {
    const is_first = !take;
    take = one;
    at = frame;
    mode = null;
    part("empty").hidden = Boolean(take);
    if (!take) paper.clearRect(0, 0, canvas.clientWidth, canvas.clientHeight);
    if (take && is_first) camera = { ...camera, ...HOME, distance: 2.4 * size() };
    play(Boolean(take));
  }

  const toggle = () => {
    if (!take) return;
    if (!playing && at >= take.frames.count - 1) at = 0;
    play(!playing);
  };
  part("play").onclick = toggle;
  part("loop").onclick = (event) => {
    const button = event.currentTarget;
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
  };
  part("near").onclick = () => nearer(1 / 1.2);
  part("far").onclick = () => nearer(1.2);
  part("home").onclick = home;
  const redraw = () => { stale = true; };
  new ResizeObserver(redraw).observe(canvas);
  requestAnimationFrame(tick);

  return {
    show, play, choose, redraw,
    get picked() { return picked; },
    set grows(is) { grows = is; },
    set onpick(does) { told_pick = does; },
  };
}
