// How a moving skeleton is drawn on a plain canvas: numbers first, paint after. It knows neither
// the page nor the server; `motion.js` does. Places are metres, Y up, right-handed.
const MotionView = (() => {
  const NEAR = 0.05; // metres in front of the eye where things end
  const FOCAL = 1.55; // picture heights per metre at a depth of one metre
  const add = (a, b, k = 1) => [a[0] + k * b[0], a[1] + k * b[1], a[2] + k * b[2]];
  const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
  const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

  // ---- the camera -----------------------------------------------------------------------

  // Directions of a camera that looks at its target: right, up, and from the target to the eye.
  function axes(yaw, pitch) {
    const [s, c, low, high] = [Math.sin(yaw), Math.cos(yaw), Math.sin(pitch), Math.cos(pitch)];
    return { right: [c, 0, -s], up: [-s * low, high, -c * low], toward: [s * high, low, c * high] };
  }

  // A camera {target, yaw, pitch, distance} on a picture of width x height, ready to project.
  function aim(camera, width, height) {
    const side = Math.min(height, 1.25 * width);
    return { ...camera, ...axes(camera.yaw, camera.pitch), width, height, focal: FOCAL * side };
  }

  // Depth of a place: metres before the eye.
  const depth = (lens, place) => lens.distance - dot(add(place, lens.target, -1), lens.toward);

  // [x, y, pixels per metre there, depth]; what is behind the eye is held just in front of it.
  function project(lens, place) {
    const local = add(place, lens.target, -1);
    const far = Math.max(lens.distance - dot(local, lens.toward), NEAR);
    const scale = lens.focal / far;
    return [lens.width / 2 + scale * dot(local, lens.right),
            lens.height / 2 - scale * dot(local, lens.up), scale, far];
  }

  // Both ends of a line, cut off where it passes the eye; null when nothing is in front.
  function line(lens, a, b) {
    const [da, db] = [depth(lens, a), depth(lens, b)];
    if (da < NEAR && db < NEAR) return null;
    const cut = (p, q, dp, dq) => add(p, add(q, p, -1), (NEAR - dp) / (dq - dp));
    return [project(lens, da < NEAR ? cut(a, b, da, db) : a),
            project(lens, db < NEAR ? cut(b, a, db, da) : b)];
  }

  // Turned by a drag of (dx, dy) pixels; it never looks from below the floor.
  const orbit = (camera, dx, dy) => ({
    ...camera, yaw: camera.yaw - 0.008 * dx, pitch: clamp(camera.pitch + 0.006 * dy, -0.02, 1.5),
  });

  const zoom = (camera, factor, size) => ({
    ...camera, distance: clamp(camera.distance * factor, 0.9 * size, 14 * size),
  });

  // ---- frames ---------------------------------------------------------------------------

  // Frames come in pieces; joints lie one after another, [frame, joint, xyz].
  function clip(joints) {
    const size = 3 * joints;
    let values = new Float32Array(64 * size);
    let count = 0;
    return {
      get count() { return count; },
      append(piece) {
        if ((count * size) + piece.length > values.length) {
          const more = new Float32Array(Math.max(2 * values.length, count * size + piece.length));
          more.set(values);
          values = more;
        }
        values.set(piece, count * size);
        count += Math.floor(piece.length / size);
      },
      // Places of all joints at a moment between frames, in straight lines.
      pose(at) {
        const low = clamp(Math.floor(at), 0, count - 1);
        const high = Math.min(low + 1, count - 1);
        const share = clamp(at - low, 0, 1);
        return Array.from({ length: joints }, (_, j) => [0, 1, 2].map((axis) => {
          const a = values[low * size + 3 * j + axis];
          return a + share * (values[high * size + 3 * j + axis] - a);
        }));
      },
      place(frame, joint = 0) {
        const from = clamp(frame, 0, count - 1) * size + 3 * joint;
        return [values[from], values[from + 1], values[from + 2]];
      },
    };
  }

  // Where the root is about a moment, smoothed over `reach` frames on both sides.
  function about(frames, at, reach) {
    let sum = [0, 0, 0];
    let weight = 0;
    const first = Math.max(0, Math.ceil(at - 2 * reach));
    const last = Math.min(frames.count - 1, Math.floor(at + 2 * reach));
    for (let k = first; k <= last; k++) {
      const w = Math.exp(-0.5 * ((k - at) / reach) ** 2);
      sum = add(sum, frames.place(k), w);
      weight += w;
    }
    return weight ? sum.map((x) => x / weight) : frames.place(Math.round(at));
  }

  // The lowest place of the first frames: where the floor is.
  function ground(frames, joints) {
    let low = Infinity;
    for (let k = 0; k < Math.min(frames.count, 40); k++)
      for (let j = 0; j < joints; j++) low = Math.min(low, frames.place(k, j)[1]);
    return Number.isFinite(low) ? low : 0;
  }

  // The next moment of playing: {at, over}. At the end it goes round, or waits for more frames.
  function next(at, seconds, { fps, speed, count, loops, grows }) {
    const end = count - 1;
    const moved = at + seconds * fps * speed;
    if (end <= 0) return { at: grows ? at : 0, over: !grows };
    if (moved < end) return { at: Math.max(0, moved), over: false };
    if (grows) return { at: end, over: false };
    return loops ? { at: (moved - end) % end, over: false } : { at: end, over: true };
  }

  // ---- the time line --------------------------------------------------------------------

  // Seconds between two marks, so that they are at least `apart` pixels from each other.
  function tick(seconds, width, apart = 56) {
    const most = Math.max(1, width / apart);
    return [0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300].find((s) => seconds / s <= most) || 600;
  }

  // A span of frames put in order, on whole steps, at least one step long, inside [0, count].
  function snap(a, b, step, count) {
    const last = Math.floor(count / step) * step;
    const low = clamp(Math.round(Math.min(a, b) / step) * step, 0, Math.max(0, last - step));
    const high = clamp(Math.round(Math.max(a, b) / step) * step, low + step, Math.max(step, last));
    return [low, high];
  }

  return { add, clamp, aim, project, line, orbit, zoom, clip, about, ground, next, tick, snap };
})();
