// Pieces that several views are made of.
import { useEffect, useRef, useState } from "preact/hooks";
import type { ComponentChildren } from "preact";
import type { Lines } from "./api";
import { count, latency } from "./words";

const marks = ["✓", "▲", "✕"];

/** A state as a word with a mark and a colour: never by colour alone. */
export function State({ level, children }: { level: 0 | 1 | 2; children: ComponentChildren }) {
  return (
    <span class={`state level${level}`}>
      <span aria-hidden="true">{marks[level]}</span> {children}
    </span>
  );
}

export function levelOf(state: string): 0 | 1 | 2 {
  if (state === "serving" || state === "standby") return 0;
  return state === "down" || state === "refused" ? 2 : 1;
}

/** A line of the last 15 minutes; the newest is at the right. */
export function Sparkline({ values, label, unit, places }: { values: number[]; label: string; unit: (n: number) => string; places: number }) {
  const width = 120;
  const height = 24;
  const most = Math.max(...values, 0);
  const now = values.at(-1) ?? 0;
  const text = `${label}: ${unit(now)} now, ${unit(most)} at most in 15 minutes`;
  const points = values.map((v, i) => {
    const x = width - ((values.length - 1 - i) * width) / (places - 1);
    return `${x.toFixed(1)},${(height - 1 - (most ? (v / most) * (height - 3) : 0)).toFixed(1)}`;
  });
  return (
    <span class="spark" title={text}>
      <svg viewBox={`0 0 ${width} ${height}`} role="img" aria-label={text}>
        {values.length > 1 && <polyline points={points.join(" ")} />}
      </svg>
    </span>
  );
}

export function Sparks({ lines, places }: { lines: Lines | undefined; places: number }) {
  return (
    <>
      <Sparkline label="in flight" values={lines?.inFlight ?? []} unit={String} places={places} />
      <Sparkline label="response time" values={lines?.responseSeconds ?? []} unit={latency} places={places} />
      <Sparkline label="failed connects" values={lines?.failed ?? []} unit={(n) => count(n, "failure")} places={places} />
    </>
  );
}

/** A list of which only what can be seen is in the page. All rows are of one height. */
export function LongList<T>({ all, height, row, label, head, className }: {
  all: T[]; height: number; row: (one: T) => ComponentChildren; label: string; head: ComponentChildren; className: string;
}) {
  const box = useRef<HTMLDivElement>(null);
  const [seen, setSeen] = useState({ top: 0, room: 800 });
  useEffect(() => {
    const el = box.current!;
    const measure = () => setSeen({ top: el.scrollTop, room: el.clientHeight });
    measure();
    el.addEventListener("scroll", measure, { passive: true });
    const sizes = new ResizeObserver(measure);
    sizes.observe(el);
    return () => {
      el.removeEventListener("scroll", measure);
      sizes.disconnect();
    };
  }, []);
  const first = Math.max(0, Math.floor(seen.top / height) - 5);
  const last = Math.min(all.length, Math.ceil((seen.top + seen.room) / height) + 5);
  return (
    <div class={`list ${className}`} role="table" aria-label={label} aria-rowcount={all.length + 1}>
      <div class="row head" role="row">{head}</div>
      <div class="scroll" ref={box} tabIndex={0} role="rowgroup">
        <div style={{ height: `${all.length * height}px`, position: "relative" }}>
          <div style={{ transform: `translateY(${first * height}px)` }}>{all.slice(first, last).map(row)}</div>
        </div>
      </div>
    </div>
  );
}

/** The time, again and again, for what is so and so long ago. */
export function useNow(): number {
  const [now, setNow] = useState(Date.now());
  useEffect(() => {
    const timer = setInterval(() => setNow(Date.now()), 1000);
    return () => clearInterval(timer);
  }, []);
  return now;
}
