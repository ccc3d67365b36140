"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");

  // Everything that differs between light and dark lies in a template, so that one relayout changes it.
  const template = (night) => {
    const [text, grid, line] = night ? ["#e3e7eb", "#2c333a", "#6b7681"] : ["#1c2024", "#e6eaee", "#8b95a0"];
    const axis = { gridcolor: grid, linecolor: line, zerolinecolor: line, tickcolor: line, automargin: true, title: { font: { size: 13 } } };
    return {
      layout: {
        font: { family: "system-ui, 'Liberation Sans', Arial, sans-serif", size: 13, color: text },
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        margin: { l: 60, r: 20, t: 30, b: 50 },
        hoverlabel: { bgcolor: night ? "#232a31" : "#ffffff", bordercolor: line, font: { color: text }, align: "left" },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: text },
        legend: { orientation: "h", y: 1, yanchor: "bottom", x: 0 },
        hovermode: "closest",
        xaxis: axis,
        yaxis: axis,
      },
    };
  };

  // Saved pictures are for papers: vector graphics on white, whatever the reader's theme.
  const save = {
    name: "save",
    title: "Save as SVG",
    icon: Plotly.Icons.camera,
    click: (div) =>
      Plotly.downloadImage(
        {
          data: div.data,
          layout: { ...div.layout, template: template(false), paper_bgcolor: "white", plot_bgcolor: "white" },
        },
        { format: "svg", filename: "figure", width: div.clientWidth, height: div.clientHeight },
      ),
  };
  const config = {
    responsive: true,
    displaylogo: false,
    modeBarButtons: [[save, "zoom2d", "pan2d", "resetScale2d"]],  // none that sends a figure elsewhere
  };

  const drawn = [];
  const draw = (div, figure) => {
    // The height goes to the element: a figure that has one itself forgets it when the window changes.
    const { height, ...layout } = figure.layout;
    div.style.height = `${height ?? 420}px`;
    drawn.push(div);
    return Plotly.newPlot(div, figure.data, { ...layout, template: template(dark.matches) }, config);
  };
  dark.addEventListener("change", () => {
    for (const div of drawn.filter((d) => d.isConnected)) {
      Plotly.relayout(div, { template: template(dark.matches) });
    }
  });

  const element = (name, content, className) => {
    const e = document.createElement(name);
    if (content !== undefined) e.textContent = content;
    if (className) e.className = className;
    return e;
  };

  const copyable = (box) => {
    const button = box.querySelector("button");
    const pre = box.querySelector("pre");
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(pre.textContent);
        button.textContent = "copied";
      } catch {
        // Some browsers give pages from a file no clipboard; what is selected can be copied by hand.
        getSelection().selectAllChildren(pre);
        button.textContent = "selected";
      }
      setTimeout(() => (button.textContent = "copy"), 1500);
    });
  };

  const records = new Map();
  for (const panel of document.querySelectorAll(".details")) {
    const data = JSON.parse(panel.querySelector("script").textContent);
    records.set(panel.dataset.name, (key) => {
      if (!Object.hasOwn(data.rows, key)) return;
      panel.replaceChildren(element("h3", `Candidate ${key}`));
      const scroll = element("div", undefined, "scroll");
      const body = scroll.appendChild(element("table")).appendChild(element("tbody"));
      data.rows[key].forEach((value, i) => {
        if (value === null || value === "") return;
        const row = body.appendChild(element("tr"));
        const head = row.appendChild(element("th", data.fields[i]));
        head.scope = "row";
        row.appendChild(element("td", String(value)));
      });
      panel.append(scroll);
      if (Object.hasOwn(data.drawings, key)) {
        draw(panel.appendChild(element("div", undefined, "figure")), data.drawings[key]);
      }
      for (const { figure, values } of data.pictures) {
        if (!Object.hasOwn(values, key)) continue;
        const flat = values[key];
        const [map] = figure.data;
        const z = map.y.map((_, i) => flat.slice(i * map.x.length, (i + 1) * map.x.length));
        const div = panel.appendChild(element("div", undefined, "figure"));
        draw(div, { data: [{ ...map, z }], layout: figure.layout });
      }
      if (data.commands.length) {
        const box = element("div", undefined, "code");
        const button = box.appendChild(element("button", "copy"));
        button.type = "button";
        box.appendChild(element("pre", data.commands.map((c) => c.replaceAll("{}", key)).join("\n")));
        copyable(box);
        panel.append(box);
      }
      panel.scrollIntoView({ block: "nearest" });
    });
  }

  for (const div of document.querySelectorAll(".figure")) {
    const source = div.querySelector("script");
    const figure = JSON.parse(source.textContent);
    source.remove();
    draw(div, figure);
    const open = records.get(div.dataset.details);
    if (open) {
      div.on("plotly_click", ({ points }) => {
        const data = points[0].customdata;
        if (data !== undefined) open(String(Array.isArray(data) ? data[0] : data));
      });
    }
  }

  document.querySelectorAll(".code").forEach(copyable);

  const nav = document.querySelector("nav");
  document.querySelectorAll("section").forEach((section, i) => {
    const heading = section.querySelector("h2");
    if (!heading) return;
    section.id = `s${i}`;
    const link = nav.appendChild(element("a", heading.textContent));
    link.href = `#s${i}`;
  });
})();
