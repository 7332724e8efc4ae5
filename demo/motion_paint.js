// Paints what `motion_view.js` computes: floor, path, figure and time line, light or dark.
const MotionPaint = (() => {
  const { add, line, project, tick } = MotionView;
  const LIGHT = {
    sky: ["#f4f6f9", "#e3e8ee"], grid: [120, 134, 154], shadow: "#ccd3dc", trail: "#c98a1b",
    left: [38, 112, 186], right: [226, 122, 32], middle: [74, 82, 96], haze: [228, 233, 239],
    edge: "#ffffff", ink: "#44403c", quiet: "#78716c", lane: "#e7e5e4", made: "#c9d6e2",
    head: "#1f4566", pick: "rgba(255, 255, 255, 0.6)", grip: "#d98700",
    parts: ["#7aa5cc", "#e0a86a", "#8fb996", "#b59ac8", "#d68f96"], label: "#1c1917",
  };
  const DARK = {
    sky: ["#20242b", "#14171c"], grid: [150, 166, 190], shadow: "#0d0f13", trail: "#ffb02e",
    left: [96, 165, 232], right: [250, 152, 72], middle: [190, 198, 210], haze: [27, 31, 37],
    edge: "#0f1115", ink: "#e7e5e4", quiet: "#a8a29e", lane: "#2b2826", made: "#3c5166",
    head: "#e7e5e4", pick: "rgba(0, 0, 0, 0.4)", grip: "#ffb02e",
    parts: ["#4f7fae", "#b37a3c", "#5f8f69", "#8a6ca0", "#a9626b"], label: "#fafaf9",
  };
  const palette = (isDark) => (isDark ? DARK : LIGHT);

  const rgb = (colour, alpha = 1) => `rgba(${colour.map(Math.round).join(",")},${alpha})`;
  const mix = (a, b, share) => a.map((x, k) => x + share * (b[k] - x));

  // ---- the scene ------------------------------------------------------------------------

  function sky(paper, lens, look) {
    const shade = paper.createLinearGradient(0, 0, 0, lens.height);
    look.sky.forEach((colour, k) => shade.addColorStop(k, colour));
    paper.fillStyle = shade;
    paper.fillRect(0, 0, lens.width, lens.height);
  }

  // Lines every half, whole, second ... metre about the target; they fade with the distance.
  function floor(paper, lens, level, look) {
    const gap = [0.25, 0.5, 1, 2, 5].find((g) => 12 * g > lens.distance) || 10;
    const reach = 10;
    const middle = [lens.target[0], lens.target[2]].map((x) => gap * Math.round(x / gap));
    for (let k = -reach; k <= reach; k++) {
      for (let piece = -reach; piece < reach; piece++) {
        for (const across of [0, 1]) {
          const ends = [piece, piece + 1].map((p) => {
            const place = [k * gap, p * gap];
            if (across) place.reverse();
            return [middle[0] + place[0], level, middle[1] + place[1]];
          });
          const away = Math.hypot((ends[0][0] + ends[1][0]) / 2 - lens.target[0],
                                  (ends[0][2] + ends[1][2]) / 2 - lens.target[2]);
          const alpha = 0.5 * (1 - away / (reach * gap)) ** 1.5;
          const drawn = alpha > 0.02 && away < reach * gap && line(lens, ...ends);
          if (!drawn) continue;
          paper.strokeStyle = rgb(look.grid, alpha);
          paper.lineWidth = 1;
          paper.beginPath();
          paper.moveTo(drawn[0][0], drawn[0][1]);
          paper.lineTo(drawn[1][0], drawn[1][1]);
          paper.stroke();
        }
      }
    }
  }

  // The way of the root on the floor: what is behind solid, what comes thin.
  function trail(paper, lens, frames, at, level, look) {
    const step = Math.max(1, Math.floor(frames.count / 600));
    paper.strokeStyle = look.trail;
    paper.lineCap = "round";
    for (let k = 0; k + 1 < frames.count; k += step) {
      const ends = [k, Math.min(k + step, frames.count - 1)].map((frame) => {
        const [x, , z] = frames.place(frame);
        return [x, level, z];
      });
      const drawn = line(lens, ...ends);
      if (!drawn) continue;
      paper.globalAlpha = k < at ? 0.85 : 0.3;
      paper.lineWidth = k < at ? 2.5 : 1.5;
      paper.beginPath();
      paper.moveTo(drawn[0][0], drawn[0][1]);
      paper.lineTo(drawn[1][0], drawn[1][1]);
      paper.stroke();
    }
    paper.globalAlpha = 1;
  }

  // A round-ended stick, thicker at one end; a and b are projected, radii in metres.
  function stick(paper, a, b, thick, thin, colour, more = 0) {
    const [ra, rb] = [thick * a[2] + more, thin * b[2] + more];
    const angle = Math.atan2(b[1] - a[1], b[0] - a[0]);
    paper.fillStyle = colour;
    paper.beginPath();
    paper.arc(a[0], a[1], ra, angle + Math.PI / 2, angle - Math.PI / 2);
    paper.arc(b[0], b[1], rb, angle - Math.PI / 2, angle + Math.PI / 2);
    paper.closePath();
    paper.fill();
  }

  function ball(paper, at, radius, colour, more = 0) {
    paper.fillStyle = colour;
    paper.beginPath();
    paper.arc(at[0], at[1], radius * at[2] + more, 0, 2 * Math.PI);
    paper.fill();
  }

  // The middle of the head: it goes on in the direction of the bone that ends there.
  function crown(pose, body) {
    if (body.head === null) return null;
    const [joint, parent] = [pose[body.head], pose[body.parents[body.head]]];
    const bone = add(joint, parent, -1);
    const length = Math.hypot(...bone) || 1;
    return add(joint, bone, body.headRadius / length);
  }

  function figure(paper, lens, pose, body, level, look) {
    const flat = (place) => project(lens, [place[0], level, place[2]]);
    for (const { joint, parent, radius } of body.bones)
      stick(paper, flat(pose[parent]), flat(pose[joint]), radius, 0.8 * radius, look.shadow);
    const top = crown(pose, body);
    if (top) ball(paper, flat(top), body.headRadius, look.shadow);
    const parts = body.bones.map(({ joint, parent, radius, side }) => {
      const ends = [project(lens, pose[parent]), project(lens, pose[joint])];
      return { ends, radius, side, far: (ends[0][3] + ends[1][3]) / 2 };
    });
    if (top) {
      const end = project(lens, top);
      parts.push({ ends: [end], radius: body.headRadius, side: "middle", far: end[3] });
    }
    const fars = parts.map(({ far }) => far);
    const [near, wide] = [Math.min(...fars), Math.max(Math.max(...fars) - Math.min(...fars), 0.2)];
    parts.sort((one, other) => other.far - one.far);
    for (const { ends, radius, side, far } of parts) {
      const colour = rgb(mix(look[side], look.haze, (0.32 * (far - near)) / wide));
      if (ends.length === 1) {
        ball(paper, ends[0], radius, look.edge, 1.2);
        ball(paper, ends[0], radius, colour);
      } else {
        stick(paper, ...ends, radius, 0.72 * radius, look.edge, 1.2);
        stick(paper, ...ends, radius, 0.72 * radius, colour);
      }
    }
  }

  // Everything of one moment.
  function scene(paper, lens, { frames, at, body, level }, look) {
    sky(paper, lens, look);
    floor(paper, lens, level, look);
    trail(paper, lens, frames, at, level, look);
    figure(paper, lens, frames.pose(at), body, level, look);
  }

  // ---- the time line --------------------------------------------------------------------

  const LANE = { top: 22, height: 26 };

  function clipped(paper, text, width) {
    if (paper.measureText(text).width <= width) return text;
    let short = text;
    while (short && paper.measureText(`${short}…`).width > width) short = short.slice(0, -1);
    return short ? `${short}…` : "";
  }

  // Marks of seconds, the parts with their words, what has arrived, a chosen span, the moment.
  function timeline(paper, width, { fps, total, count, at, parts, picked, cut }, look, font) {
    const [x, bottom] = [(frame) => (frame / Math.max(total, 1)) * width, LANE.top + LANE.height];
    paper.clearRect(0, 0, width, 64);
    paper.fillStyle = look.lane;
    paper.beginPath();
    paper.roundRect(0, LANE.top, width, LANE.height, 6);
    paper.fill();
    paper.save();
    paper.clip();
    parts.forEach(({ from, to, text, given }, k) => {
      const shade = given ? look.made : look.parts[k % look.parts.length];
      const end = Math.min(to, count);
      paper.fillStyle = shade;
      paper.globalAlpha = 0.28; // what is still to come
      paper.fillRect(x(from), LANE.top, x(to) - x(from), LANE.height);
      paper.globalAlpha = 1;
      if (end > from) paper.fillRect(x(from), LANE.top, x(end) - x(from), LANE.height);
      paper.fillStyle = look.label;
      paper.font = `12px ${font}`;
      paper.textBaseline = "middle";
      const words = clipped(paper, text, x(to) - x(from) - 12);
      paper.fillText(words, x(from) + 6, LANE.top + LANE.height / 2 + 1);
      if (from > 0) {
        paper.fillStyle = look.edge;
        paper.fillRect(x(from) - 1, LANE.top, 2, LANE.height);
      }
    });
    paper.restore();
    paper.font = `11px ${font}`;
    paper.textBaseline = "alphabetic";
    const gap = tick(total / fps, width);
    for (let s = 0; s * fps <= total + 1e-6; s += gap) {
      paper.fillStyle = look.quiet;
      const label = `${s} s`;
      const wide = paper.measureText(label).width;
      paper.fillRect(Math.min(x(s * fps), width - 1), LANE.top - 5, 1, 5);
      paper.fillText(label, Math.min(Math.max(0, x(s * fps) - wide / 2), width - wide), 12);
    }
    const anew = picked || (cut !== null && [cut, total]);
    if (anew) {
      hatch(paper, x(anew[0]), x(anew[1]), look);
      for (const frame of picked || [cut]) grip(paper, x(frame), width, look);
    }
    const here = Math.min(Math.max(x(at), 1), width - 1);
    paper.fillStyle = look.head;
    paper.fillRect(here - 1, LANE.top - 3, 2, LANE.height + 6);
    paper.beginPath();
    paper.arc(here, bottom + 5, 5, 0, 2 * Math.PI);
    paper.fill();
  }

  // Stripes over what will be made anew.
  function hatch(paper, left, right, look) {
    const { top, height } = LANE;
    paper.save();
    paper.beginPath();
    paper.rect(left, top, right - left, height);
    paper.clip();
    paper.strokeStyle = look.pick;
    paper.lineWidth = 4;
    paper.beginPath();
    for (let x = left - height; x < right; x += 10) {
      paper.moveTo(x, top + height);
      paper.lineTo(x + height, top);
    }
    paper.stroke();
    paper.strokeStyle = look.grip;
    paper.lineWidth = 3;
    paper.strokeRect(left, top, right - left, height);
    paper.restore();
  }

  function grip(paper, place, width, look) {
    const at = Math.min(Math.max(place, 3), width - 3);
    paper.fillStyle = look.grip;
    paper.beginPath();
    paper.roundRect(at - 3, LANE.top - 4, 6, LANE.height + 8, 3);
    paper.fill();
  }

  return { palette, scene, timeline };
})();
